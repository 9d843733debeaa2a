/* A stand-in for libcuda.so.1: the functions of NVIDIA's driver that kernels/cuda.py calls, on a CPU.
 *
 * The "machine code" of a module is the path of a library that the C compiler made of the same source. What a
 * real driver refuses is refused here, too: a launch without a current context in this thread, or with more
 * shared memory than was asked for. Tests set the variables below to make the card smaller or to break it. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NO_BINARY = 209, INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };

int standin_multiprocessors = 2, standin_shared_bytes = 232448, standin_capability = 90;
int standin_job_bytes = 0;  /* of the struct that kernels are given by value */
int standin_launches = 0, standin_fail_at = -1;  /* the number of the launch that fails, from 0 */

/* By value, a struct of this size is passed as any of more than 16 bytes is: on the stack or by its address. */
typedef struct {
    char bytes[512];
} Job;

typedef struct {
    void (*run)(Job job, long long replicas);
    int shared_bytes, carveout;
} Function;

static int context, failed;
static _Thread_local void *current;

int cuDeviceGet(int *device, int number) {
    *device = 40 + number;
    return number == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "Stand-in");
    return device == 40 ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 13: *value = 1000000; break;
        case 16: *value = standin_multiprocessors; break;
        case 75: *value = standin_capability / 10; break;
        case 76: *value = standin_capability % 10; break;
        case 81: *value = standin_shared_bytes + 1024; break;
        case 97: *value = standin_shared_bytes; break;
        default: return INVALID_VALUE;
    }
    return device == 40 ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void **made, int device) {
    *made = &context;
    return device == 40 ? SUCCESS : INVALID_VALUE;
}

int cuCtxSetCurrent(void *made) {
    current = made;
    return made == &context ? SUCCESS : INVALID_CONTEXT;
}

int cuModuleLoadData(void **module, const void *image) {
    if (current != &context) return INVALID_CONTEXT;
    *module = dlopen(image, RTLD_NOW | RTLD_LOCAL);
    return *module ? SUCCESS : NO_BINARY;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    Function *made = calloc(1, sizeof *made);
    made->shared_bytes = 49152;
    made->run = (void (*)(Job, long long))dlsym(module, name);
    *function = made;
    return made->run ? SUCCESS : NOT_FOUND;
}

int cuModuleGetGlobal_v2(void **address, size_t *size, void *module, const char *name) {
    *address = dlsym(module, name);
    *size = sizeof(int);
    return *address ? SUCCESS : NOT_FOUND;
}

int cuMemcpyDtoH_v2(void *to, const void *from, size_t size) {
    memcpy(to, from, size);
    return current == &context ? SUCCESS : INVALID_CONTEXT;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    Function *own = function;
    if (attribute == 8 && value <= standin_shared_bytes) own->shared_bytes = value;
    else if (attribute == 9 && value <= 100) own->carveout = value;
    else return INVALID_VALUE;
    return SUCCESS;
}

/* Only with the full carve-out do blocks share all of the 228 KB less 1 KB a block. */
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared_bytes) {
    Function *own = function;
    int total = own->carveout == 100 ? standin_shared_bytes + 1024 : 102400;
    int by_threads = threads > 0 ? 2048 / threads : 0, by_memory = total / (int)(shared_bytes + 1024);
    *blocks = by_threads < by_memory ? by_threads : by_memory;
    return shared_bytes <= (size_t)own->shared_bytes ? SUCCESS : INVALID_VALUE;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                   unsigned shared_bytes, void *stream, void **arguments, void **extra) {
    Function *own = function;
    if (current != &context) return INVALID_CONTEXT;
    if (!x || y != 1 || z != 1 || !threads || threads % 32 || threads > 1024 || ty != 1 || tz != 1 || extra || stream)
        return INVALID_VALUE;
    if (shared_bytes > (unsigned)own->shared_bytes) return INVALID_VALUE;
    failed = standin_launches++ == standin_fail_at;
    if (failed) return SUCCESS;
    Job job;
    memcpy(&job, arguments[0], standin_job_bytes);
    own->run(job, x);
    return SUCCESS;
}

int cuStreamSynchronize(void *stream) {
    if (current != &context || stream) return INVALID_CONTEXT;
    return failed ? ILLEGAL_ADDRESS : SUCCESS;
}

int cuGetErrorName(int status, const char **text) {
    *text = status == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int status, const char **text) {
    static _Thread_local char said[64];
    snprintf(said, sizeof said, "error %d of the stand-in", status);
    *text = said;
    return SUCCESS;
}
