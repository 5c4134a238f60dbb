/*
 * instructions.c - what benchmarks/instructions.py counts: each scenario's call between two marks
 * that callgrind obeys.
 *
 * Everything is set up, and done once, before it is counted: memory is there and nothing is left to
 * the allocator.  Each count is dumped under its scenario's name; the first, of nothing, is what
 * the marks themselves cost.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/callgrind.h>

#include "pyblock.h"

enum { BATCH = 1000, LINE = PB_NAME_MAX + 1 };

#define TEXT(literal) "" literal, sizeof(literal) - 1

static void must(int64_t got, const char *what) {
    if (got >= 0) return;
    fprintf(stderr, "instructions: %s answered %d\n", what, (int)got);
    exit(EXIT_FAILURE);
}

/*
 * The result must be looked at, or the compiler might drop the call; not before the second mark, or
 * that would be counted.
 */
#define COUNT(name, call)               \
    do {                                \
        CALLGRIND_ZERO_STATS;           \
        CALLGRIND_TOGGLE_COLLECT;       \
        int64_t got_ = (call);          \
        CALLGRIND_TOGGLE_COLLECT;       \
        CALLGRIND_DUMP_STATS_AT(name);  \
        must(got_, name);               \
    } while (0)

static uint32_t *numbers, *ordinals_out;
static char *out;

/*
 * Filled without a search, so that a slow one is counted where it matters and does not first make
 * this take for ever.
 */
static pb_index *filled(int64_t capacity, int64_t taken) {
    pb_index *index = pb_index_new(capacity);
    int64_t *all = malloc((size_t)(taken + 1) * sizeof *all);
    if (!index || !all) must(PB_ENOMEM, "malloc");
    for (int64_t i = 0; i < taken; i++) all[i] = i;
    must(pb_index_reserve_many(index, taken, all, NULL), "reserve_many");
    free(all);
    return index;
}

/* The counts of one pair, at an occupancy. */
static void pair(const char *acquire, const char *release, int64_t capacity, int64_t taken) {
    pb_index *index = filled(capacity, taken);
    must(pb_index_release(index, pb_index_acquire(index)), "pair");
    COUNT(acquire, pb_index_acquire(index));
    COUNT(release, pb_index_release(index, taken));
    pb_index_free(index);
}

/* An index with memory for BATCH and nothing taken. */
static pb_index *grown(void) {
    pb_index *index = filled(PB_CAPACITY_DEFAULT, BATCH);
    for (int64_t i = 0; i < BATCH; i++) must(pb_index_release(index, i), "release");
    return index;
}

static void plans(void) {
    pb_index *index = grown(), *ordinals = grown();
    COUNT("plan", pb_plan(index, ordinals));
    pb_index_free(index), pb_index_free(ordinals);

    index = grown(), ordinals = grown();
    COUNT("plan_many of 1000", pb_plan_many(index, ordinals, BATCH, numbers, ordinals_out));
    pb_index_free(index), pb_index_free(ordinals);
}

int main(void) {
    numbers = malloc(BATCH * sizeof *numbers);
    ordinals_out = malloc(BATCH * sizeof *ordinals_out);
    out = malloc(BATCH * LINE);
    if (!numbers || !ordinals_out || !out) must(PB_ENOMEM, "malloc");

    COUNT("nothing", 0);
    /*
     * Occupancies that fill no word with the index acquired: that costs a few instructions more,
     * wherever it happens.
     */
    pair("acquire, none of 65536 taken", "release, none of 65536 taken", 65536, 0);
    pair("acquire, 50 % of 65536 taken", "release, 50 % of 65536 taken", 65536, 32768);
    pair("acquire, 99.9 % of 65536 taken", "release, 99.9 % of 65536 taken", 65536, 65470);
    pair("acquire, 99.9 % of 2^20 taken", "release, 99.9 % of 2^20 taken", PB_CAPACITY_MAX, 1047527);
    pb_index *index = grown();
    COUNT("acquire_many of 1000", pb_index_acquire_many(index, BATCH, numbers));
    pb_index_free(index);

    COUNT("drive_name", pb_drive_name(700, TEXT("vd"), out, PB_NAME_MAX));
    COUNT("drive_names of 1000", pb_drive_names(0, BATCH, TEXT("vd"), out, BATCH * LINE));
    COUNT("drive_index", pb_drive_index(TEXT("vdzy"), TEXT("vd")));
    COUNT("scsi_address", pb_scsi_address(700, out, PB_SCSI_ADDRESS_MAX));
    COUNT("scsi_addresses of 1000", pb_scsi_addresses(0, BATCH, out, BATCH * LINE));
    COUNT("scsi_index", pb_scsi_index(TEXT("2:188")));
    COUNT("make_id short", pb_make_id(TEXT("drive"), TEXT("0123456789abcdef"), 0, PB_ID_MAX, out, PB_ID_MAX));
    COUNT("make_id shortened", pb_make_id(TEXT("drive"), TEXT("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"), 0,
                                          PB_ID_MAX, out, PB_ID_MAX));
    plans();
    return EXIT_SUCCESS;
}
