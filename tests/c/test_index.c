/*
 * test_index.c - the block index against its contract and against a plain array of flags.
 */
#include <stdlib.h>

#include "check.h"

bool test_index_hands_out_the_lowest(void) {
    pb_index *index = pb_index_new(PB_CAPACITY_DEFAULT);
    for (int64_t i = 0; i < 200; i++) CHECK(pb_index_acquire(index) == i);
    CHECK(pb_index_count(index) == 200);
    CHECK(pb_index_release(index, 150) == 150 && pb_index_release(index, 3) == 3 && pb_index_release(index, 64) == 64);
    CHECK(pb_index_acquire(index) == 3 && pb_index_acquire(index) == 64 && pb_index_acquire(index) == 150);
    CHECK(pb_index_acquire(index) == 200);
    pb_index_free(index);
    return true;
}

bool test_index_capacity_edges(void) {
    CHECK(!pb_index_new(0) && !pb_index_new(-1) && !pb_index_new(PB_CAPACITY_MAX + 1) && !pb_index_new(INT64_MAX) &&
          !pb_index_new(INT64_MIN));
    pb_index_free(NULL);
    const int64_t capacities[] = {1, 2, 63, 64, 65, 127, 128, 4095, 4096, 4097, 65535, 65536, 262144, 262145, PB_CAPACITY_MAX};
    for (size_t c = 0; c < sizeof capacities / sizeof *capacities; c++) {
        int64_t capacity = capacities[c];
        pb_index *index = pb_index_new(capacity);
        CHECK(index && pb_index_capacity(index) == capacity);
        for (int64_t i = 0; i < capacity; i++) CHECK(pb_index_acquire(index) == i);
        CHECK(pb_index_acquire(index) == PB_EFULL && pb_index_count(index) == capacity);
        CHECK(pb_index_release(index, capacity - 1) == capacity - 1);
        CHECK(pb_index_acquire(index) == capacity - 1 && pb_index_acquire(index) == PB_EFULL);
        pb_index_free(index);
    }
    return true;
}

bool test_index_reserve_and_release(void) {
    pb_index *index = pb_index_new(1000);
    CHECK(pb_index_reserve(index, 999) == 999 && pb_index_reserve(index, 0) == 0);
    CHECK(pb_index_reserve(index, 999) == PB_ETAKEN);
    CHECK(pb_index_reserve(index, 1000) == PB_ERANGE && pb_index_reserve(index, -1) == PB_ERANGE);
    CHECK(pb_index_reserve(index, INT64_MAX) == PB_ERANGE && pb_index_reserve(index, INT64_MIN) == PB_ERANGE);
    CHECK(pb_index_acquire(index) == 1);
    CHECK(pb_index_test(index, 999) == 1 && pb_index_test(index, 998) == 0 && pb_index_test(index, 1) == 1);
    CHECK(pb_index_test(index, -1) == 0 && pb_index_test(index, 1000) == 0 && pb_index_test(index, INT64_MAX) == 0);
    CHECK(pb_index_release(index, 998) == PB_EFREE && pb_index_release(index, 999) == 999 && pb_index_release(index, 999) == PB_EFREE);
    CHECK(pb_index_release(index, 1000) == PB_ERANGE && pb_index_release(index, -1) == PB_ERANGE);
    CHECK(pb_index_release(index, INT64_MAX) == PB_ERANGE && pb_index_count(index) == 2);
    pb_index_free(index);

    index = pb_index_new(PB_CAPACITY_MAX);
    /* where there is no word yet */
    CHECK(pb_index_release(index, PB_CAPACITY_MAX - 1) == PB_EFREE);
    pb_index_free(index);
    return true;
}

/* A hole in a full index, wherever it is, is the next index given out. */
bool test_index_crosses_every_level(void) {
    pb_index *index = pb_index_new(PB_CAPACITY_MAX);
    uint32_t *out = malloc(PB_CAPACITY_MAX * sizeof *out);
    CHECK(out && pb_index_acquire_many(index, PB_CAPACITY_MAX, out) == PB_CAPACITY_MAX);
    for (uint32_t i = 0; i < PB_CAPACITY_MAX; i++) CHECK(out[i] == i);
    free(out);
    for (int64_t step = 1; step < PB_CAPACITY_MAX; step *= 64) {
        for (int64_t around = -1; around <= 1; around++) {
            int64_t hole = step + around, higher = PB_CAPACITY_MAX - 1;
            CHECK(pb_index_release(index, higher) == higher && pb_index_release(index, hole) == hole);
            CHECK(pb_index_acquire(index) == hole && pb_index_acquire(index) == higher && pb_index_acquire(index) == PB_EFULL);
        }
    }
    pb_index_free(index);
    return true;
}

bool test_index_many_is_all_or_none(void) {
    pb_index *index = pb_index_new(100);
    uint32_t out[100];
    CHECK(pb_index_reserve(index, 1) == 1);
    CHECK(pb_index_acquire_many(index, 100, out) == PB_EFULL && pb_index_count(index) == 1);
    CHECK(pb_index_acquire_many(index, INT64_MAX, out) == PB_EFULL && pb_index_acquire_many(index, -1, out) == PB_ERANGE);
    CHECK(pb_index_acquire_many(index, 0, out) == 0 && pb_index_count(index) == 1);
    CHECK(pb_index_acquire_many(index, 3, out) == 3 && out[0] == 0 && out[1] == 2 && out[2] == 3);
    CHECK(pb_index_acquire_many(index, 96, out) == 96 && out[0] == 4 && out[95] == 99);
    CHECK(pb_index_acquire_many(index, 0, out) == 0 && pb_index_acquire_many(index, 1, out) == PB_EFULL);
    pb_index_free(index);
    return true;
}

bool test_index_reserve_many_names_bad(void) {
    pb_index *index = pb_index_new(5000);
    int64_t bad = 77;
    CHECK(pb_index_reserve(index, 10) == 10);
    CHECK(pb_index_reserve_many(index, 4, (int64_t[]){4999, 0, 64, 4096}, &bad) == 4 && bad == -1);
    CHECK(pb_index_reserve_many(index, 3, (int64_t[]){1, 2, 10}, &bad) == PB_ETAKEN && bad == 2);
    CHECK(pb_index_reserve_many(index, 4, (int64_t[]){1, 2, 3, 1}, &bad) == PB_ETAKEN && bad == 3);
    CHECK(pb_index_reserve_many(index, 3, (int64_t[]){1, 5000, 10}, &bad) == PB_ERANGE && bad == 1);
    CHECK(pb_index_reserve_many(index, 3, (int64_t[]){1, 10, 5000}, &bad) == PB_ETAKEN && bad == 1);
    CHECK(pb_index_reserve_many(index, 3, (int64_t[]){1, 1, INT64_MIN}, NULL) == PB_ETAKEN);
    CHECK(pb_index_reserve_many(index, 1, (int64_t[]){INT64_MAX}, &bad) == PB_ERANGE && bad == 0);
    CHECK(pb_index_reserve_many(index, -1, (int64_t[]){1}, &bad) == PB_ERANGE && bad == -1);
    CHECK(pb_index_reserve_many(index, 0, (int64_t[]){1}, &bad) == 0 && bad == -1);
    CHECK(pb_index_count(index) == 5 && pb_index_acquire(index) == 1);
    pb_index_free(index);
    return true;
}

bool test_index_list_in_chunks(void) {
    pb_index *index = pb_index_new(300000);
    const uint32_t taken[] = {0, 63, 64, 127, 128, 4095, 4096, 262143, 299999};
    enum { COUNT = sizeof taken / sizeof *taken };
    for (size_t i = 0; i < COUNT; i++) CHECK(pb_index_reserve(index, taken[i]) == taken[i]);
    uint32_t out[COUNT + 1];
    CHECK(pb_index_list(index, 0, COUNT + 1, out) == COUNT && memcmp(out, taken, sizeof taken) == 0);
    CHECK(pb_index_list(index, INT64_MIN, 2, out) == 2 && out[1] == 63);
    CHECK(pb_index_list(index, 64, 3, out) == 3 && out[0] == 64 && out[2] == 128);
    CHECK(pb_index_list(index, 65, 2, out) == 2 && out[0] == 127 && out[1] == 128);
    CHECK(pb_index_list(index, 300000, 1, out) == 0 && pb_index_list(index, INT64_MAX, 1, out) == 0);
    CHECK(pb_index_list(index, 0, 0, out) == 0 && pb_index_list(index, 0, -1, out) == PB_ERANGE);
    pb_index_free(index);
    return true;
}

bool test_index_memory_stays_small(void) {
    pb_index *index = pb_index_new(PB_CAPACITY_MAX);
    int64_t empty = pb_index_memory(index);
    CHECK(empty <= 128);
    for (int i = 0; i < 64; i++) pb_index_acquire(index);
    CHECK(pb_index_memory(index) == empty);
    pb_index_acquire(index);
    CHECK(pb_index_memory(index) > empty && pb_index_memory(index) <= 512);
    pb_index_reserve(index, PB_CAPACITY_MAX - 1);
    CHECK(pb_index_memory(index) == empty + PB_CAPACITY_MAX / 8 + PB_CAPACITY_MAX / 64 / 8);
    pb_index_free(index);
    return true;
}

/* 200,000 steps of every kind, near full, near empty and in between. */
bool test_index_against_oracle(void) {
    enum { CAPACITY = 4097 + 64 };
    pb_index *index = pb_index_new(CAPACITY);
    bool taken[CAPACITY] = {false};
    int64_t used = 0;
    uint64_t seed = 1;
    for (int step = 0; step < 200000; step++) {
        int64_t lowest = 0, value = next_random(&seed) % CAPACITY;
        while (lowest < CAPACITY && taken[lowest]) lowest++;
        bool filling = step / 20000 % 2 == 0;
        switch (next_random(&seed) % 8) {
        case 0:
        case 1:
        case 2:
        case 3:
            if (filling) {
                CHECK(pb_index_acquire(index) == (lowest < CAPACITY ? lowest : PB_EFULL));
                if (lowest < CAPACITY) taken[lowest] = true, used++;
                break;
            } /* fall through */
        case 4:
            CHECK(pb_index_release(index, value) == (taken[value] ? value : PB_EFREE));
            used -= taken[value];
            taken[value] = false;
            break;
        case 5:
            CHECK(pb_index_reserve(index, value) == (taken[value] ? PB_ETAKEN : value));
            used += !taken[value];
            taken[value] = true;
            break;
        default:
            CHECK(pb_index_test(index, value) == taken[value]);
            CHECK(pb_index_count(index) == used);
        }
    }
    pb_index_free(index);
    return true;
}

/* Where memory runs out, the call says so and the index is what it was before. */
bool test_index_without_memory(void) {
    allocations_left = 0;
    bool none = pb_index_new(1) == NULL;
    allocations_left = -1;
    CHECK(none);

    pb_index *index = pb_index_new(PB_CAPACITY_MAX), *ordinals = pb_index_new(PB_CAPACITY_MAX);
    uint32_t out[64], numbers[64];
    CHECK(pb_index_acquire_many(index, 64, out) == 64);
    int64_t memory = pb_index_memory(index), bad = 7;
    allocations_left = 0;
    int64_t acquired = pb_index_acquire(index), many = pb_index_acquire_many(index, 2, out), reserved = pb_index_reserve(index, 64);
    int64_t all = pb_index_reserve_many(index, 2, (int64_t[]){64, 5000}, &bad);
    int64_t plan = pb_plan(index, ordinals), plans = pb_plan_many(ordinals, index, 3, out, numbers);
    allocations_left = -1;
    CHECK(acquired == PB_ENOMEM && many == PB_ENOMEM && reserved == PB_ENOMEM && all == PB_ENOMEM && bad == -1);
    CHECK(plan == PB_ENOMEM && plans == PB_ENOMEM);
    CHECK(pb_index_count(index) == 64 && pb_index_count(ordinals) == 0 && pb_index_memory(index) == memory);
    CHECK(pb_index_release(index, 5) == 5 && pb_index_acquire(index) == 5 && pb_index_acquire(index) == 64);
    pb_index_free(index);
    pb_index_free(ordinals);
    return true;
}
