// kernels/convnet1989.c as a program, for machines and checks that Python cannot load it into. Standard input:
// n as int64, struct state, parameters and two more sets of their size, images and targets. Standard output:
// the three sets after one pass, then the outputs for the images.
#include "../kernels/convnet1989.c"

#include <stdio.h>
#include <stdlib.h>

static const int sizes[8] = {300, 768, 2400, 192, 5760, 30, 300, 10};

static void *get(size_t bytes) {
    void *p = malloc(bytes);
    if (!p || fread(p, 1, bytes, stdin) != bytes) exit(3);
    return p;
}

int main(void) {
    int32_t reads[96];  // SCHEME ANY: round-robin
    for (int i = 0; i < 96; i++) reads[i] = (i / 8 + i % 8) % 12;
    int64_t *n = get(sizeof *n);
    struct state *s = get(sizeof *s);
    float *sets[3][8];
    for (int set = 0; set < 3; set++)
        for (int i = 0; i < 8; i++) sets[set][i] = get(sizes[i] * sizeof(float));
    float *images = get(*n * 400 * sizeof(float)), *targets = get(*n * 10 * sizeof(float));
    float *outputs = malloc(*n * 10 * sizeof(float));
    if (train_pass(sets[0], sets[1], sets[2], images, targets, *n, BATCH ? 7 : 1, reads, s)) return 4;
    compute_outputs(sets[0], images, *n, reads, outputs);
    for (int set = 0; set < 3; set++)
        for (int i = 0; i < 8; i++) fwrite(sets[set][i], sizeof(float), sizes[i], stdout), free(sets[set][i]);
    fwrite(outputs, sizeof(float), *n * 10, stdout);
    free(n), free(s), free(images), free(targets), free(outputs);
    return fflush(stdout) != 0;
}
