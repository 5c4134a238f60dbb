/*
 * test_plan.c - plans take from two indexes or from neither, and their text is what the single functions write.
 */
#include <stdlib.h>

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

/* Reads the next line; its length. */
static size_t next_line(const char **at, const char **line) {
    *line = *at;
    const char *stop = strchr(*at, '\n');
    *at = stop + 1;
    return (size_t)(stop - *line);
}

bool test_plan_text_agrees(void) {
    enum { N = 3000, ROOM = N * PB_PLAN_MAX };
    pb_index *index = pb_index_new(PB_CAPACITY_DEFAULT), *ordinals = pb_index_new(PB_CAPACITY_DEFAULT);
    uint64_t seed = 7;
    for (int i = 0; i < 1500; i++) {
        pb_index_reserve(index, next_random(&seed) % 5000);
        pb_index_reserve(ordinals, next_random(&seed) % 3000);
    }
    static char ids[N * 40], out[ROOM + 1], one[PB_NAME_MAX];
    static uint32_t indexes[N], numbers[N];
    size_t ids_len = 0;
    for (int i = 0; i < N; i++) ids_len += (size_t)sprintf(ids + ids_len, "%0*d\n", 1 + i % 35, i % 7);
    int64_t len = pb_plan_text(index, ordinals, N, ids, ids_len, TEXT("drive"), TEXT("vd"), 1, 1, indexes, numbers, out, ROOM);
    CHECK(len > 0 && pb_index_count(index) >= N);
    out[len] = '\0';

    const char *at = out, *id = ids, *line, *id_line;
    for (int i = 0; i < N; i++) {
        size_t line_len = next_line(&at, &line), id_len = next_line(&id, &id_line);
        int64_t one_len = pb_make_id(TEXT("drive"), id_line, id_len, 0, PB_ID_MAX, one, sizeof one);
        CHECK(one_len == (int64_t)line_len && memcmp(one, line, line_len) == 0);
    }
    for (int i = 0; i < N; i++) {
        size_t line_len = next_line(&at, &line);
        int64_t one_len = pb_scsi_address(indexes[i], one, sizeof one);
        CHECK(one_len == (int64_t)line_len && memcmp(one, line, line_len) == 0);
    }
    for (int i = 0; i < N; i++) {
        size_t line_len = next_line(&at, &line);
        int64_t one_len = pb_drive_name((int64_t)numbers[i] + 1, TEXT("vd"), one, sizeof one);
        CHECK(one_len == (int64_t)line_len && memcmp(one, line, line_len) == 0);
    }
    CHECK(at == out + len);
    pb_index_free(index);
    pb_index_free(ordinals);
    return true;
}

/* Buffers of exactly the documented size: a copy of constant size must never run over the last one. */
bool test_plan_text_copies_any_length(void) {
    for (size_t len = 1; len <= 80; len++) {
        for (int64_t n = 1; n <= 3; n++) {
            pb_index *index = pb_index_new(100), *ordinals = pb_index_new(100);
            size_t ids_len = (size_t)n * (len + 1), room = (size_t)n * PB_PLAN_MAX;
            char *ids = malloc(ids_len), *out = malloc(room);
            uint32_t *indexes = malloc((size_t)n * sizeof *indexes), *numbers = malloc((size_t)n * sizeof *numbers);
            CHECK(ids && out && indexes && numbers);
            memset(ids, 'x', ids_len);
            for (int64_t i = 1; i <= n; i++) ids[(size_t)i * (len + 1) - 1] = '\n';
            CHECK(pb_plan_text(index, ordinals, n, ids, ids_len, TEXT("drive"), TEXT("vd"), 5, 1, indexes, numbers, out, room) > 0);
            free(ids);
            free(out);
            free(indexes);
            free(numbers);
            pb_index_free(index);
            pb_index_free(ordinals);
        }
    }
    return true;
}

bool test_plan_text_refuses(void) {
    pb_index *index = pb_index_new(PB_CAPACITY_DEFAULT), *ordinals = pb_index_new(PB_CAPACITY_DEFAULT);
    uint32_t a[4], b[4];
    char out[4 * PB_PLAN_MAX];
#define PLAN(n, ids, kind, prefix, offset, room) \
    pb_plan_text(index, ordinals, n, TEXT(ids), TEXT(kind), TEXT(prefix), offset, 1, a, b, out, room)
    CHECK(PLAN(2, "a\n", "drive", "vd", 0, sizeof out) == PB_EINVAL && PLAN(1, "a\nb\n", "drive", "vd", 0, sizeof out) == PB_EINVAL);
    CHECK(PLAN(1, "a", "drive", "vd", 0, sizeof out) == PB_EINVAL && PLAN(1, "\n", "drive", "vd", 0, sizeof out) == PB_EINVAL);
    CHECK(PLAN(0, "a\n", "drive", "vd", 0, sizeof out) == PB_EINVAL && PLAN(0, "", "drive", "vd", 0, 0) == 0);
    CHECK(PLAN(1, "a\n", "", "vd", 0, sizeof out) == PB_EINVAL && PLAN(1, "a\n", "a\nb", "vd", 0, sizeof out) == PB_EINVAL);
    CHECK(PLAN(1, "a\n", "drive", "v\n", 0, sizeof out) == PB_EINVAL);
    CHECK(PLAN(-1, "", "drive", "vd", 0, sizeof out) == PB_ERANGE && PLAN(1, "a\n", "drive", "vd", -1, sizeof out) == PB_ERANGE);
    CHECK(PLAN(1, "a\n", "drive", "vd", INT64_MAX, sizeof out) == PB_ERANGE);
    CHECK(PLAN(4, "a\nb\nc\nd\n", "drive", "vd", 0, sizeof out - 1) == PB_ETOOLONG &&
          PLAN(INT64_MAX, "a\n", "drive", "vd", 0, sizeof out) == PB_ETOOLONG);
    CHECK(PLAN(1, "a\n", "1234567890123456789012345678901", "vd", 0, sizeof out) == PB_ETOOLONG);
    CHECK(PLAN(2, "a\n123456789012345\n", "12345678901234567", "vd", 0, sizeof out) == PB_ETOOLONG);
    CHECK(PLAN(1, "a\n", "drive", "1234567890123456789012345678901", 0, sizeof out) == PB_ETOOLONG);
    CHECK(pb_plan_text(index, index, 1, TEXT("a\n"), TEXT("drive"), TEXT("vd"), 0, 1, a, b, out, sizeof out) == PB_EINVAL);
    CHECK(pb_index_count(index) == 0 && pb_index_count(ordinals) == 0);
    CHECK(PLAN(1, "a\n", "drive", "vd", INT64_MAX - PB_CAPACITY_MAX, sizeof out) > 0);
#undef PLAN
    pb_index_free(index);
    pb_index_free(ordinals);
    return true;
}

/* What is only found after taking is given back whole. */
bool test_plan_text_leaves_nothing(void) {
    pb_index *index = pb_index_new(PB_CAPACITY_MAX), *ordinals = pb_index_new(100);
    uint32_t a[4], b[4];
    char out[4 * PB_PLAN_MAX];
    for (int64_t i = 0; i < PB_SCSI_INDEX_MAX; i++) pb_index_acquire(index);
    CHECK(pb_plan_text(index, ordinals, 2, TEXT("a\nb\n"), TEXT("drive"), TEXT("vd"), 0, 1, a, b, out, sizeof out) == PB_ERANGE);
    CHECK(pb_index_count(index) == PB_SCSI_INDEX_MAX && pb_index_count(ordinals) == 0);
    /* The second name is one letter too long. */
    const char prefix[] = "123456789012345678901234567890";
    CHECK(pb_plan_text(index, ordinals, 2, TEXT("a\nb\n"), TEXT("drive"), prefix, 30, 25, 0, a, b, out, sizeof out) == PB_ETOOLONG);
    CHECK(pb_index_count(index) == PB_SCSI_INDEX_MAX && pb_index_count(ordinals) == 0);
    CHECK(pb_plan_text(index, ordinals, 2, TEXT("a\nb\n"), TEXT("drive"), TEXT("vd"), 0, 0, a, b, out, sizeof out) > 0);
    CHECK(a[0] == PB_SCSI_INDEX_MAX && a[1] == PB_SCSI_INDEX_MAX + 1 && b[0] == 0 && b[1] == 1);
    pb_index_free(index);
    pb_index_free(ordinals);
    return true;
}

/* More indexes than the core has locks: some two have the same one, and are planned with all the same. */
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
