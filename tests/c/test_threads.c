/*
 * test_threads.c - eight threads on the same indexes.  Meant for ThreadSanitizer, but whoever is
 * given an index writes that down, so that two owners of one index are seen without it too.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

enum { THREADS = 8, ROUNDS = 20000, CAPACITY = 64 * 8 };

static pb_index *shared_index, *shared_ordinals;
static atomic_int owner[CAPACITY];
static atomic_int wrong;

static bool run_threads(void *(*body)(void *)) {
    pthread_t threads[THREADS];
    int numbers[THREADS];
    wrong = 0;
    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i + 1;
        if (pthread_create(&threads[i], NULL, body, &numbers[i]) != 0) return false;
    }
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    return wrong == 0;
}

static void own(uint32_t i, int me) {
    if (atomic_exchange(&owner[i], me) != 0) wrong++;
}

static void disown(uint32_t i, int me) {
    if (atomic_exchange(&owner[i], 0) != me) wrong++;
}

static void *acquire_and_release(void *number) {
    int me = *(int *)number;
    uint64_t seed = (uint64_t)me;
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t mine[8];
        int64_t n = 1 + next_random(&seed) % 8;
        if (n == 1) {
            int64_t got = pb_index_acquire(shared_index);
            if (got < 0) wrong++;
            mine[0] = (uint32_t)got;
        } else if (n == 2) {
            int64_t value = CAPACITY / 2 + next_random(&seed) % (CAPACITY / 2);
            int64_t got = pb_index_reserve(shared_index, value);
            if (got == PB_ETAKEN) continue;
            if (got != value) wrong++;
            mine[0] = (uint32_t)value;
            n = 1;
        } else if (pb_index_acquire_many(shared_index, n, mine) != n) {
            wrong++;
            continue;
        }
        for (int64_t i = 0; i < n; i++) own(mine[i], me);
        if (pb_index_test(shared_index, mine[0]) != 1 || pb_index_count(shared_index) < n) wrong++;
        uint32_t seen[CAPACITY];
        if (round % 64 == 0 && pb_index_list(shared_index, 0, CAPACITY, seen) < n) wrong++;
        for (int64_t i = 0; i < n; i++) {
            disown(mine[i], me);
            if (pb_index_release(shared_index, mine[i]) != mine[i]) wrong++;
        }
    }
    return NULL;
}

bool test_threads_never_share_an_index(void) {
    shared_index = pb_index_new(CAPACITY);
    CHECK(run_threads(acquire_and_release));
    CHECK(pb_index_count(shared_index) == 0 && pb_index_acquire(shared_index) == 0);
    pb_index_free(shared_index);
    return true;
}

/*
 * Half of the threads name the two indexes the other way round: with a careless lock order this
 * never ends.
 */
static void *plan_and_release(void *number) {
    int me = *(int *)number;
    pb_index *index = me % 2 ? shared_index : shared_ordinals, *ordinals = me % 2 ? shared_ordinals : shared_index;
    for (int round = 0; round < ROUNDS; round++) {
        int64_t plan = pb_plan(index, ordinals);
        if (plan < 0) {
            wrong++;
            continue;
        }
        uint32_t first = (uint32_t)(plan & UINT32_MAX), second = (uint32_t)(plan >> 32);
        uint32_t mine = me % 2 ? first : second; /* of shared_index */
        own(mine, me);
        disown(mine, me);
        if (pb_index_release(index, first) != first || pb_index_release(ordinals, second) != second) wrong++;
    }
    return NULL;
}

bool test_threads_plan_both_ways(void) {
    shared_index = pb_index_new(CAPACITY);
    shared_ordinals = pb_index_new(CAPACITY);
    CHECK(run_threads(plan_and_release));
    CHECK(pb_index_count(shared_index) == 0 && pb_index_count(shared_ordinals) == 0);
    pb_index_free(shared_index);
    pb_index_free(shared_ordinals);
    return true;
}

static void *write_text(void *number) {
    int64_t me = *(int *)number;
    for (int64_t round = 0; round < ROUNDS; round++) {
        char name[PB_NAME_MAX], address[PB_SCSI_ADDRESS_MAX];
        int64_t n = round * THREADS + me;
        int64_t len = pb_drive_name(n, TEXT("vd"), name, sizeof name);
        if (pb_drive_index(name, (size_t)len, TEXT("vd")) != n) wrong++;
        len = pb_scsi_address(n % 65536, address, sizeof address);
        if (pb_scsi_index(address, (size_t)len) != n % 65536) wrong++;
    }
    return NULL;
}

bool test_threads_write_own_text(void) {
    CHECK(run_threads(write_text));
    return true;
}
