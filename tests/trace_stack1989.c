// kernels/stack1989.c with every access to shared memory written to standard output: in which phase, by which
// task, by which instruction, where, of how many bytes. To be compiled with -fsanitize=thread, which puts calls of
// the functions below before each access; they take the place of the sanitizer's own.
#include <stdio.h>
#include <string.h>

static volatile int phase, task, logging;

#define EACH(t, n) for (int t = (phase++, task = 0); t < (n); task = ++t)
#define EACH_FROM_LAST EACH
#define BARRIER
#define KERNEL(name)

#include SOURCE

static struct memory memory;

#define PLAIN __attribute__((no_sanitize_thread))
PLAIN static void note(const void *address, int bytes, const void *instruction) {
    const long at = (const char *)address - (const char *)&memory;
    const int row[] = {phase, task, (int)((const char *)instruction - (const char *)note), (int)at, bytes};
    if (logging && at >= 0 && at < (long)sizeof memory) fwrite(row, sizeof row, 1, stdout);
}
#define HOOK(name, bytes) \
    PLAIN void __tsan_##name(const void *p) { note(p, bytes, __builtin_return_address(0)); }
HOOK(read1, 1) HOOK(read2, 2) HOOK(read4, 4) HOOK(read8, 8) HOOK(read16, 16)
HOOK(write1, 1) HOOK(write2, 2) HOOK(write4, 4) HOOK(write8, 8) HOOK(write16, 16)
PLAIN void __tsan_func_entry(void *p) { (void)p; }
PLAIN void __tsan_func_exit(void) {}
PLAIN void __tsan_init(void) {}

int main(void) {  // a digit of zeros
    static struct four net[FLOATS(network) / 4];
    static float images[400], targets[10];
    static const word seed = 1;
    struct job job = {0};
    job.net = (float *)net, job.images = images, job.targets = targets, job.seeds = &seed, job.n = 1;
    logging = 1;
    train_replica(&memory, &job, 0);
    return fflush(stdout) != 0;
}
