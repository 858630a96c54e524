/* Counts the bytes that torch has from the C library, below its own allocator: live, and at their peak.
 *
 * Torch's CPU allocator takes every tensor's memory from posix_memalign and gives it back to free. Loaded with
 * LD_PRELOAD, these come here first. It shares nothing with what it is compared with.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *block);

#define SLOTS (1u << 20)
static struct { void *block; size_t size; } table[SLOTS];
static size_t live, peak;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t home(void *block) { return ((uintptr_t)block >> 6) * 0x9E3779B97F4A7C15ull >> 44; }

static void add(void *block, size_t size) {
    size_t i = home(block);
    while (table[i].block) i = (i + 1) % SLOTS;
    table[i].block = block, table[i].size = size;
    live += size;
    if (live > peak) peak = live;
}

static void drop(void *block) {
    size_t i = home(block), j, k;
    while (table[i].block && table[i].block != block) i = (i + 1) % SLOTS;
    if (!table[i].block) return; /* not torch's */
    live -= table[i].size;
    for (j = (i + 1) % SLOTS; table[j].block; j = (j + 1) % SLOTS) { /* close the gap of open addressing */
        k = home(table[j].block);
        if ((j - k) % SLOTS >= (j - i) % SLOTS) table[i] = table[j], i = j;
    }
    table[i].block = NULL;
}

int posix_memalign(void **out, size_t alignment, size_t size) {
    *out = __libc_memalign(alignment, size);
    if (!*out) return 12; /* ENOMEM */
    pthread_mutex_lock(&lock);
    add(*out, size);
    pthread_mutex_unlock(&lock);
    return 0;
}

void free(void *block) {
    if (!block) return;
    pthread_mutex_lock(&lock);
    drop(block);
    pthread_mutex_unlock(&lock);
    __libc_free(block);
}

size_t shim_live(void) { return live; }
size_t shim_peak(void) { return peak; }
void shim_reset(void) { peak = live; }
