// kernels/stack1989.c with a block of real threads and barriers, as a program, for a thread sanitizer.
// Standard input: which kernel, replicas, threads, whether to take tasks backwards, which barrier to leave out (-1:
// none), struct job, and for each of its pointers the bytes there are and the bytes. Standard output: the latter.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static struct {
    long long kernel, replicas, threads, backwards, removed;
} run;
// Two barriers take turns: a thread may wait at the next one while another is still leaving the last, and at a
// single one the sanitizer would take that for an order between what both did.
static pthread_barrier_t barriers[2];
static __thread int thread, turn;

static int wait_for_all(void) { return pthread_barrier_wait(&barriers[turn++ % 2]); }

static int task(int number, int n) { return run.backwards ? n - 1 - number : number; }

#define TASKS(first, t, n) \
    for (int number = first, t; number < (n) && (t = task(number, n), 1); number += (int)run.threads)
#define EACH(t, n) TASKS(thread, t, n)
#define EACH_FROM_LAST(t, n) TASKS((int)run.threads - 1 - thread, t, n)
#define BARRIER ((void)(__COUNTER__ != run.removed && wait_for_all()))
#define KERNEL(name)

#include "../kernels/stack1989.c"

static struct memory memory;
static struct job job;

static void *run_thread(void *own) {
    thread = *(int *)own;
    for (int replica = 0; replica < run.replicas; replica++) {
        if (run.kernel == 0) train_replica(&memory, &job, replica);
        if (run.kernel == 1) evaluate_replica(&memory, &job, replica);
        if (run.kernel == 2) layout_replica(&memory, &job, replica);
        wait_for_all();
    }
    return NULL;
}

static void get(void *to, size_t bytes) {
    if (bytes && fread(to, bytes, 1, stdin) != 1) exit(3);
}

int main(void) {
    void **pointers = (void **)&job;
    long long bytes[11];
    get(&run, sizeof run);
    get(&job, sizeof job);
    for (int i = 0; i < 11; i++) {
        get(&bytes[i], sizeof bytes[i]);
        pointers[i] = bytes[i] ? malloc(bytes[i]) : NULL;
        get(pointers[i], bytes[i]);
    }
    pthread_t threads[1024];
    int numbers[1024];
    for (int i = 0; i < 2; i++) pthread_barrier_init(&barriers[i], NULL, run.threads);
    for (int i = 0; i < run.threads; i++) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, run_thread, &numbers[i])) exit(4);
    }
    for (int i = 0; i < run.threads; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 11; i++) {
        fwrite(pointers[i], 1, bytes[i], stdout);
        free(pointers[i]);
    }
    return fflush(stdout) != 0;
}
