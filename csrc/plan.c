/*
 * plan.c - all that a drive is given before it is plugged in, in one crossing.
 *
 * Everything that can go wrong is found before anything is taken, or at once after, with both locks still held; so no
 * other thread ever sees an index taken by a plan that then fails.  The text is written after the locks are dropped.
 *
 * Lock order: of two locks the one at the lower address is taken first, whatever its index's part in the plan.  Two plans
 * that name the same two indexes the other way round therefore cannot wait for each other.
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

/* With both locks held.  Both are prepared before either is taken from, so there is nothing to undo. */
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

/* With both locks held: takes n of each, or nothing. */
static int64_t take_both(pb_index *index, pb_index *ordinals, int64_t n, uint32_t *indexes, uint32_t *numbers) {
    int64_t status = prepare_both(index, ordinals, n);
    if (status < 0) return status;
    for (int64_t i = 0; i < n; i++) indexes[i] = pb_take_lowest(index);
    for (int64_t i = 0; i < n; i++) numbers[i] = pb_take_lowest(ordinals);
    return n;
}

int64_t pb_plan_many(pb_index *index, pb_index *ordinals, int64_t n, uint32_t *indexes, uint32_t *numbers) {
    if (index == ordinals) return PB_EINVAL;
    lock_both(index, ordinals);
    int64_t result = take_both(index, ordinals, n, indexes, numbers);
    unlock_both(index, ordinals);
    return result;
}

/*
 * Writes the n drive IDs of ids, a line each; returns the bytes written.  An ID that fits, as nearly all do, is copied
 * with moves of constant size, which run over its end into what the next line overwrites.
 */
static int64_t put_ids(int64_t n, const char *ids, size_t ids_len, const char *kind, size_t kind_len, char *out) {
    enum { COPY = PB_ID_MAX + 1 };
    if (kind_len == 0 || memchr(kind, '\n', kind_len)) return PB_EINVAL;
    if (kind_len >= PB_ID_MAX) return PB_ETOOLONG;
    char head[COPY] = {0};
    memcpy(head, kind, kind_len);
    head[kind_len] = '-';
    size_t room = PB_ID_MAX - kind_len - 1;

    char *at = out;
    const char *end = ids + ids_len;
    for (; n > 0; n--) {
        size_t left = (size_t)(end - ids);
        const char *stop = memchr(ids, '\n', left);
        if (!stop || stop == ids) return PB_EINVAL;
        size_t len = (size_t)(stop - ids);
        if (len <= room && left >= COPY) {
            memcpy(at, head, COPY);
            memcpy(at + kind_len + 1, ids, COPY);
            at += kind_len + 1 + len;
        } else {
            int64_t written = pb_make_id(kind, kind_len, ids, len, 0, PB_ID_MAX, at, PB_ID_MAX);
            if (written < 0) return written;
            at += written;
        }
        *at++ = '\n';
        ids = stop + 1;
    }
    return ids == end ? at - out : PB_EINVAL;
}

int64_t pb_plan_text(pb_index *index, pb_index *ordinals, int64_t n, const char *ids, size_t ids_len, const char *kind, size_t kind_len,
                     const char *prefix, size_t prefix_len, int64_t offset, int scsi, uint32_t *indexes, uint32_t *numbers,
                     char *out, size_t room) {
    if (index == ordinals || (prefix_len > 0 && memchr(prefix, '\n', prefix_len))) return PB_EINVAL;
    if (n < 0 || offset < 0 || offset > INT64_MAX - PB_CAPACITY_MAX) return PB_ERANGE;
    if ((uint64_t)n > room / PB_PLAN_MAX) return PB_ETOOLONG;
    int64_t status = put_ids(n, ids, ids_len, kind, kind_len, out);
    if (status < 0 || n == 0) return status;
    char *at = out + status;

    pb_name name;
    lock_both(index, ordinals);
    status = take_both(index, ordinals, n, indexes, numbers);
    if (status > 0) {
        /* Both rows ascend, so what the last of each allows all others allow. */
        bool reachable = !scsi || indexes[n - 1] <= PB_SCSI_INDEX_MAX;
        status = reachable ? pb_name_set(&name, offset + numbers[n - 1], prefix, prefix_len) : PB_ERANGE;
        for (int64_t i = 0; status < 0 && i < n; i++) {
            pb_give_back(index, indexes[i]);
            pb_give_back(ordinals, numbers[i]);
        }
    }
    unlock_both(index, ordinals);
    if (status < 0) return status;

    for (int64_t i = 0; i < n; i++) {
        if (scsi) at += pb_put_scsi(at, indexes[i]);
        *at++ = '\n';
    }
    for (int64_t i = 0; i < n; i++) {
        if (i > 0 && numbers[i] == numbers[i - 1] + 1) {
            pb_name_next(&name);
        } else {
            pb_name_set(&name, offset + numbers[i], prefix, prefix_len);
        }
        at = pb_name_put(&name, at);
    }
    return at - out;
}
