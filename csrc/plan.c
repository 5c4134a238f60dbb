/*
 * plan.c - the numbers that a drive is given before it is plugged in, in one crossing.
 *
 * Everything that can go wrong is found before anything is taken, with both locks held; so no other
 * thread ever sees an index taken by a plan that then fails.
 *
 * Lock order: of two locks the one at the lower address is taken first, whatever its index's part
 * in the plan.  Two plans that name the same two indexes the other way round therefore cannot wait
 * for each other.
 */
#include "internal.h"

static void lock_both(pb_index *a, pb_index *b) {
    pthread_mutex_t *first = pb_lock_of(a), *second = pb_lock_of(b);
    if (first > second) {
        first = second;
        second = pb_lock_of(a);
    }
    pthread_mutex_lock(first);
    if (second != first) pthread_mutex_lock(second);
}

static void unlock_both(pb_index *a, pb_index *b) {
    pthread_mutex_unlock(pb_lock_of(a));
    if (pb_lock_of(b) != pb_lock_of(a)) pthread_mutex_unlock(pb_lock_of(b));
}

/*
 * With both locks held.  Both are prepared before either is taken from, so there is nothing to
 * undo.
 */
static int64_t prepare_both(pb_index *index, pb_index *ordinals, int64_t n) {
    int64_t status = pb_prepare(index, n);
    return status < 0 ? status : pb_prepare(ordinals, n);
}

int64_t pb_plan(pb_index *index, pb_index *ordinals) {
    if (index == ordinals) return PB_EINVAL;
    lock_both(index, ordinals);
    int64_t result = prepare_both(index, ordinals, 1);
    if (result == 0) {
        result = pb_take_lowest(index);
        result |= (int64_t)pb_take_lowest(ordinals) << 32;
    }
    unlock_both(index, ordinals);
    return result;
}

int64_t pb_plan_many(pb_index *index, pb_index *ordinals, int64_t n, uint32_t *indexes,
                     uint32_t *numbers) {
    if (index == ordinals) return PB_EINVAL;
    lock_both(index, ordinals);
    int64_t result = prepare_both(index, ordinals, n);
    if (result == 0) {
        for (int64_t i = 0; i < n; i++) indexes[i] = pb_take_lowest(index);
        for (int64_t i = 0; i < n; i++) numbers[i] = pb_take_lowest(ordinals);
        result = n;
    }
    unlock_both(index, ordinals);
    return result;
}
