/*
 * index.c - the lowest free integer, at the same price however many are taken.
 *
 * A leaf word holds 64 indexes, a bit each.  A mid word has a bit for each of 64 leaf words and
 * says which of them are full; the top words say the same of mid words.  Four top words cover
 * 4 * 64 * 64 * 64 = 2^20 indexes, so the lowest free index is the first zero bit of one top word,
 * one mid word and one leaf word.
 *
 * With 0 ... 4098 taken, and 70 given back (the rightmost bit is the lowest; what is not drawn is
 * 0):
 *
 *     top    [ ...0 0 0 ]                            bit 0: not all of mid word 0 is full
 *                     |
 *     mid    [ 1 1 1 ... 1 0 1 ]  [ ...0 ]           its bit 1: leaf word 1 is not full
 *                          |
 *     leaf   [ 1...1 ]  [ 1...1 0 1 1 1 1 1 1 ]  ... its bit 6 is free: 1 * 64 + 6 = 70
 *
 * One fact saves most of the cases: of the indexes 0 ... used, at least one is free.  So the lowest
 * free index is never above `used`, the n lowest never above `used + n - 1`, and once the words for
 * those are there, taking them cannot fail.  For the same reason nothing marks the bits behind the
 * capacity: while used < capacity, the search ends before it reaches them.
 *
 * The locks are not in the indexes but in a table that all indexes share.  So a process can have
 * all of them for the moment of a fork, however many indexes there are: its child then finds none
 * taken by a thread that stayed behind, and no index half changed.  That two indexes may have the
 * same lock costs little, for it is held so shortly.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

#define FULL UINT64_MAX
#define TOP_WORDS (PB_CAPACITY_MAX / 64 / 64 / 64)

struct pb_index {
    pb_head head;
    uint32_t capacity;
    uint32_t used;
    uint32_t held;  /* leaf words that there is memory for; the indexes of all others are free */
    uint64_t *leaf; /* leaf words, and behind them in the same block the mid words */
    uint64_t *mid;
    uint64_t top[TOP_WORDS];
    uint64_t first[2]; /* the first leaf word and its mid word: most sandboxes never need more */
};

/*
 * well above the number of threads that are in here at once; a power of two, as the count of
 * indexes may wrap
 */
#define LOCKS 64

typedef struct {
    _Alignas(64) pthread_mutex_t mutex; /* a cache line each */
} pb_mutex;

static pb_mutex locks[LOCKS];
static atomic_uint dealt; /* they are given to new indexes in turn */

#ifdef __linux__
_Static_assert(sizeof(struct pb_index) <= 88,
               "a process may hold 10,000 sandboxes with several indexes each");
#endif

static uint32_t words_for(uint32_t bits) {
    return (bits + 63) / 64;
}

static uint64_t bit(uint32_t i) {
    return (uint64_t)1 << (i % 64);
}

static uint32_t lowest_zero(uint64_t word) {
    return (uint32_t)__builtin_ctzll(~word);
}

static bool in_range(const pb_index *index, int64_t value) {
    return value >= 0 && value < index->capacity;
}

static bool is_taken(const pb_index *index, uint32_t i) {
    return i / 64 < index->held && (index->leaf[i / 64] & bit(i)) != 0;
}

static void take(pb_index *index, uint32_t i) {
    uint32_t leaf = i / 64, mid = leaf / 64;
    index->used++;
    if ((index->leaf[leaf] |= bit(i)) != FULL) return;
    if ((index->mid[mid] |= bit(leaf)) != FULL) return;
    index->top[mid / 64] |= bit(mid);
}

static void give_back(pb_index *index, uint32_t i) {
    uint32_t leaf = i / 64, mid = leaf / 64;
    index->used--;
    index->leaf[leaf] &= ~bit(i);
    index->mid[mid] &= ~bit(leaf);
    index->top[mid / 64] &= ~bit(mid);
}

uint32_t pb_take_lowest(pb_index *index) {
    uint32_t top = 0;
    while (index->top[top] == FULL) top++;
    uint32_t mid = top * 64 + lowest_zero(index->top[top]);
    uint32_t leaf = mid * 64 + lowest_zero(index->mid[mid]);
    uint32_t i = leaf * 64 + lowest_zero(index->leaf[leaf]);
    take(index, i);
    return i;
}

/* Makes sure that there are words for indexes up to last, which is below the capacity. */
static int64_t grow(pb_index *index, uint32_t last) {
    uint32_t need = last / 64 + 1;
    if (need <= index->held) return 0;
    uint32_t words = 2 * index->held, most = words_for(index->capacity);
    if (words > most) words = most;
    if (words < need) words = need;

    uint64_t *block = calloc(words + words_for(words), sizeof *block);
    if (!block) return PB_ENOMEM;
    memcpy(block, index->leaf, index->held * sizeof *block);
    memcpy(block + words, index->mid, words_for(index->held) * sizeof *block);
    if (index->leaf != index->first) free(index->leaf);
    index->leaf = block;
    index->mid = block + words;
    index->held = words;
    return 0;
}

int64_t pb_prepare(pb_index *index, int64_t n) {
    if (n < 0) return PB_ERANGE;
    if (n > index->capacity - index->used) return PB_EFULL;
    if (n == 0) return 0;
    return grow(index, index->used + (uint32_t)n - 1);
}

static void before_fork(void) {
    for (int i = 0; i < LOCKS; i++) pthread_mutex_lock(&locks[i].mutex);
}

/*
 * In the parent and in the child, where the thread that forked lives on as the only one and has
 * them as well.
 */
static void after_fork(void) {
    for (int i = LOCKS - 1; i >= 0; i--) pthread_mutex_unlock(&locks[i].mutex);
}

static bool made;

static void make_locks(void) {
    made = true;
    for (int i = 0; i < LOCKS; i++) made = made && pthread_mutex_init(&locks[i].mutex, NULL) == 0;
    made = made && pthread_atfork(before_fork, after_fork, after_fork) == 0;
}

pb_index *pb_index_new(int64_t capacity) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (capacity < 1 || capacity > PB_CAPACITY_MAX) return NULL;
    if (pthread_once(&once, make_locks) != 0 || !made) return NULL;
    pb_index *index = calloc(1, sizeof *index);
    if (!index) return NULL;
    unsigned number = atomic_fetch_add_explicit(&dealt, 1, memory_order_relaxed);
    index->head.lock = &locks[number % LOCKS].mutex;
    index->capacity = (uint32_t)capacity;
    index->held = 1;
    index->leaf = &index->first[0];
    index->mid = &index->first[1];
    return index;
}

void pb_index_free(pb_index *index) {
    if (!index) return;
    if (index->leaf != index->first) free(index->leaf);
    free(index);
}

int64_t pb_index_acquire(pb_index *index) {
    pb_lock(index);
    int64_t result = pb_prepare(index, 1);
    if (result == 0) result = pb_take_lowest(index);
    pb_unlock(index);
    return result;
}

int64_t pb_index_acquire_many(pb_index *index, int64_t n, uint32_t *out) {
    pb_lock(index);
    int64_t status = pb_prepare(index, n);
    for (int64_t i = 0; status == 0 && i < n; i++) out[i] = pb_take_lowest(index);
    pb_unlock(index);
    return status < 0 ? status : n;
}

int64_t pb_index_reserve(pb_index *index, int64_t value) {
    if (!in_range(index, value)) return PB_ERANGE;
    uint32_t i = (uint32_t)value;
    pb_lock(index);
    int64_t status = is_taken(index, i) ? PB_ETAKEN : grow(index, i);
    if (status == 0) take(index, i);
    pb_unlock(index);
    return status < 0 ? status : value;
}

int64_t pb_index_reserve_many(pb_index *index, int64_t n, const int64_t *values, int64_t *bad) {
    if (bad) *bad = -1;
    if (n < 0) return PB_ERANGE;

    int64_t good = 0, highest = 0;
    while (good < n && in_range(index, values[good])) {
        if (values[good] > highest) highest = values[good];
        good++;
    }

    /*
     * Those before the first that is out of range are taken all the same: one of them may be the
     * first that is bad.
     */
    pb_lock(index);
    int64_t done = 0;
    int64_t status = grow(index, (uint32_t)highest);
    while (status == 0 && done < good) {
        uint32_t i = (uint32_t)values[done];
        if (is_taken(index, i)) {
            status = PB_ETAKEN;
        } else {
            take(index, i);
            done++;
        }
    }
    if (status == 0 && good < n) status = PB_ERANGE;
    if (status < 0) {
        if (bad && status != PB_ENOMEM) *bad = done;
        while (done > 0) give_back(index, (uint32_t)values[--done]);
    }
    pb_unlock(index);
    return status < 0 ? status : n;
}

int64_t pb_index_release(pb_index *index, int64_t value) {
    if (!in_range(index, value)) return PB_ERANGE;
    uint32_t i = (uint32_t)value;
    pb_lock(index);
    bool taken = is_taken(index, i);
    if (taken) give_back(index, i);
    pb_unlock(index);
    return taken ? value : PB_EFREE;
}

int64_t pb_index_test(pb_index *index, int64_t value) {
    if (!in_range(index, value)) return 0;
    pb_lock(index);
    bool taken = is_taken(index, (uint32_t)value);
    pb_unlock(index);
    return taken;
}

int64_t pb_index_count(pb_index *index) {
    pb_lock(index);
    int64_t used = index->used;
    pb_unlock(index);
    return used;
}

int64_t pb_index_capacity(pb_index *index) {
    return index->capacity; /* never changes: no lock */
}

int64_t pb_index_list(pb_index *index, int64_t from, int64_t n, uint32_t *out) {
    if (n < 0) return PB_ERANGE;
    if (from < 0) from = 0;
    if (from >= index->capacity) return 0;
    uint32_t start = (uint32_t)from;
    uint64_t mask = FULL << (start % 64); /* of the first word, only what is not below start */
    int64_t found = 0;
    pb_lock(index);
    for (uint32_t w = start / 64; w < index->held; w++, mask = FULL) {
        for (uint64_t word = index->leaf[w] & mask; word != 0 && found < n; word &= word - 1) {
            out[found++] = w * 64 + (uint32_t)__builtin_ctzll(word);
        }
    }
    pb_unlock(index);
    return found;
}

int64_t pb_index_memory(pb_index *index) {
    pb_lock(index);
    size_t words = index->leaf == index->first ? 0 : index->held + words_for(index->held);
    pb_unlock(index);
    return (int64_t)(sizeof *index + words * sizeof *index->leaf);
}
