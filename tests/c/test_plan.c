/*
 * test_plan.c - plans take from two indexes or from neither.
 */
#include "check.h"

bool test_plan_pairs(void) {
    pb_index *index = pb_index_new(100), *ordinals = pb_index_new(3);
    uint32_t indexes[4], numbers[4];
    CHECK(pb_index_reserve(index, 0) == 0 && pb_index_reserve(ordinals, 1) == 1);
    CHECK(pb_plan(index, ordinals) == 1);
    CHECK(pb_plan_many(index, ordinals, 2, indexes, numbers) == PB_EFULL);
    CHECK(pb_index_count(index) == 2 && pb_index_count(ordinals) == 2);
    CHECK(pb_plan(index, ordinals) == ((int64_t)2 << 32 | 2));
    CHECK(pb_plan(index, ordinals) == PB_EFULL && pb_plan(ordinals, index) == PB_EFULL && pb_index_count(index) == 3);
    CHECK(pb_plan(index, index) == PB_EINVAL && pb_plan_many(index, index, 1, indexes, numbers) == PB_EINVAL);
    CHECK(pb_plan_many(index, ordinals, -1, indexes, numbers) == PB_ERANGE && pb_plan_many(index, ordinals, 0, indexes, numbers) == 0);
    CHECK(pb_index_release(ordinals, 0) == 0 && pb_index_release(ordinals, 2) == 2);
    CHECK(pb_plan_many(index, ordinals, 2, indexes, numbers) == 2);
    CHECK(indexes[0] == 3 && indexes[1] == 4 && numbers[0] == 0 && numbers[1] == 2);
    pb_index_free(index);
    pb_index_free(ordinals);
    return true;
}

/*
 * More indexes than the core has locks: some two have the same one, and are planned with all the
 * same.
 */
bool test_plan_any_two(void) {
    enum { MANY = 200 };
    pb_index *all[MANY];
    for (int i = 0; i < MANY; i++) all[i] = pb_index_new(PB_CAPACITY_DEFAULT);
    for (int i = 0; i < MANY; i++) {
        for (int j = 0; j < MANY; j++) CHECK(i == j ? pb_plan(all[i], all[j]) == PB_EINVAL : pb_plan(all[i], all[j]) >= 0);
    }
    for (int i = 0; i < MANY; i++) {
        CHECK(pb_index_count(all[i]) == 2 * (MANY - 1));
        pb_index_free(all[i]);
    }
    return true;
}
