/*
 * fuzz_index.c - a row of operations on two block indexes, each step compared with an array of
 * bytes searched from its start.
 *
 * A step compares its status, what it wrote, and the count.  Small indexes are also compared whole
 * after each step, large ones where the fuzzer lists them and at the end: a byte array of 2^20
 * takes longer to read than the core takes for the step.
 */
#include "fuzz.h"

enum { SMALL = 512, WHOLE = 130, STEPS = 100, AT_ONCE = 1 << 15, WORK = 1 << 17 };

typedef struct {
    pb_index *core;
    int64_t capacity, used;
    uint8_t *taken;
} pair;

/*
 * Mostly of a few words or of a few thousand indexes, where a mid word fills; those up to 2^20 are
 * 100 times slower and so seldom.
 */
static int64_t capacity_of(fuzz_input *in) {
    uint64_t how = fuzz_word(in, 1);
    if (how == 0xFF) return 1 + (fuzz_number(in) & (PB_CAPACITY_MAX - 1));
    return 1 + (int64_t)(fuzz_word(in, 2) % (how % 4 == 3 ? 9000 : SMALL));
}

static pair make_pair(fuzz_input *in, int which) {
    /* of the oracle's own: a block of that size anew each time is slow */
    static uint8_t taken[2][PB_CAPACITY_MAX];
    pair made = {.capacity = capacity_of(in), .taken = taken[which]};
    made.core = pb_index_new(made.capacity);
    memset(made.taken, 0, (size_t)made.capacity);
    MUST(made.core && pb_index_capacity(made.core) == made.capacity);
    return made;
}

static bool inside(const pair *p, int64_t value) {
    return value >= 0 && value < p->capacity;
}

/*
 * The probe begins at 0 for the first of a row; what it went past stays taken, so the next may go
 * on from there.
 */
static int64_t naive_acquire(pair *p, int64_t from) {
    if (p->taken[from]) from = (const uint8_t *)memchr(p->taken + from, 0, (size_t)(p->capacity - from)) - p->taken;
    p->taken[from] = 1;
    p->used++;
    return from;
}

/* What acquiring n must answer, apart from running out of memory, which only the core knows. */
static int64_t naive_room(const pair *p, int64_t n) {
    return n < 0 ? PB_ERANGE : n > p->capacity - p->used ? PB_EFULL : 0;
}

/*
 * With memory refused in the call the answer is PB_ENOMEM and nothing is taken, else the oracle's.
 */
static bool refused(int64_t got) {
    if (fuzz_was_refused) MUST(got == PB_ENOMEM);
    return fuzz_was_refused;
}

/* The first taken one at or after from, the capacity when there is none. */
static int64_t next_taken(const pair *p, int64_t from) {
    /* before a call, as most are in a full index */
    if (from < p->capacity && p->taken[from]) return from;
    const uint8_t *at = from < p->capacity ? memchr(p->taken + from, 1, (size_t)(p->capacity - from)) : NULL;
    return at ? at - p->taken : p->capacity;
}

static void compare_list(const pair *p, int64_t from, int64_t n) {
    uint32_t *out = fuzz_block((size_t)(n < 0 ? 0 : n) * sizeof *out);
    int64_t got = pb_index_list(p->core, from, n, out);
    if (n < 0) {
        MUST(got == PB_ERANGE);
    } else {
        int64_t found = 0;
        for (int64_t i = next_taken(p, from < 0 ? 0 : from); i < p->capacity && found < n; i = next_taken(p, i + 1)) {
            MUST(found < got && out[found] == i);
            found++;
        }
        MUST(found == got);
    }
    free(out);
}

static void check_acquired(pair *p, int64_t n, const uint32_t *out) {
    int64_t from = 0;
    for (int64_t i = 0; i < n; i++) {
        from = naive_acquire(p, from);
        MUST(out[i] == from);
    }
}

static void reserve_many(pair *p, fuzz_input *in) {
    int64_t n = (int64_t)fuzz_word(in, 1) % 40;
    int64_t step = fuzz_number(in) % 4097, value = fuzz_number(in);
    int64_t *values = fuzz_block((size_t)n * sizeof *values);
    for (int64_t i = 0; i < n; i++) {
        values[i] = value;
        if (value > -PB_CAPACITY_MAX && value < 2 * PB_CAPACITY_MAX) value += step;
        if (i % 8 == 7) value = fuzz_number(in);
    }
    int64_t want = n, first_bad = -1, done = 0;
    for (; done < n; done++) {
        if (!inside(p, values[done]) || p->taken[values[done]]) {
            want = inside(p, values[done]) ? PB_ETAKEN : PB_ERANGE;
            first_bad = done;
            break;
        }
        p->taken[values[done]] = 1;
    }
    int64_t bad = -2;
    bool ask = fuzz_word(in, 1) % 4 != 0;
    int64_t got = pb_index_reserve_many(p->core, n, values, ask ? &bad : NULL);
    bool failed = refused(got);
    if (failed) first_bad = -1;
    if (failed || want < 0) {
        while (done > 0) p->taken[values[--done]] = 0;
    } else {
        p->used += n;
    }
    if (!failed) MUST(got == want);
    if (ask) MUST(bad == first_bad);
    MUST(pb_index_reserve_many(p->core, -1 - step * step, values, NULL) == PB_ERANGE);
    free(values);
}

static void plan_many(pair *p, pair *other, int64_t n) {
    int64_t room = naive_room(p, n) < 0 ? naive_room(p, n) : naive_room(other, n);
    size_t size = room < 0 ? 0 : (size_t)n * sizeof(uint32_t);
    uint32_t *indexes = fuzz_block(size), *numbers = fuzz_block(size);
    int64_t got = pb_plan_many(p->core, other->core, n, indexes, numbers);
    if (!refused(got)) MUST(got == (room < 0 ? room : n));
    if (got > 0) {
        check_acquired(p, n, indexes);
        check_acquired(other, n, numbers);
    }
    free(indexes);
    free(numbers);
}

/* Returns about how many indexes were gone through. */
static int64_t step(pair *p, pair *other, fuzz_input *in) {
    uint64_t op = fuzz_word(in, 1);
    fuzz_no_memory = op >= 0xE0;
    fuzz_was_refused = false;
    int64_t got, want, n, value;
    switch (op % 16) {
    case 0:
    case 1:
    case 2:
        got = pb_index_acquire(p->core);
        want = naive_room(p, 1);
        if (!refused(got)) MUST(got == (want < 0 ? want : naive_acquire(p, 0)));
        return p->capacity / 64;
    case 3:
    case 4: {
        /* One in two fills it but for a few, since words of all levels are to be full. */
        n = op % 16 == 4 ? p->capacity - p->used - (int64_t)(fuzz_word(in, 1) % 8) : fuzz_number(in);
        if (n > AT_ONCE && naive_room(p, n) == 0) n = AT_ONCE;
        want = naive_room(p, n);
        uint32_t *out = fuzz_block(want < 0 ? 0 : (size_t)n * sizeof *out);
        got = pb_index_acquire_many(p->core, n, out);
        if (!refused(got)) MUST(got == (want < 0 ? want : n));
        if (got > 0) check_acquired(p, n, out);
        free(out);
        return got > 0 ? n : 1;
    }
    case 5:
    case 6:
        value = fuzz_number(in);
        got = pb_index_reserve(p->core, value);
        want = !inside(p, value) ? PB_ERANGE : p->taken[value] ? PB_ETAKEN : value;
        if (!refused(got)) {
            MUST(got == want);
            if (want >= 0) p->taken[value] = 1, p->used++;
        }
        return 1;
    case 7:
    case 8: reserve_many(p, in); return 40;
    case 9:
    case 10:
        value = fuzz_number(in);
        want = !inside(p, value) ? PB_ERANGE : p->taken[value] ? value : PB_EFREE;
        MUST(pb_index_release(p->core, value) == want);
        if (want >= 0) p->taken[value] = 0, p->used--;
        return 1;
    case 11: {
        /*
         * A row of releases: holes in many words at once, which single steps would take long to
         * make.
         */
        int64_t by = 1 + (fuzz_number(in) & 4095);
        n = 0;
        for (value = fuzz_number(in); inside(p, value) && n < AT_ONCE; value += by, n++) {
            MUST(pb_index_release(p->core, value) == (p->taken[value] ? value : PB_EFREE));
            p->used -= p->taken[value];
            p->taken[value] = 0;
        }
        return n;
    }
    case 12:
        value = fuzz_number(in);
        MUST(pb_index_test(p->core, value) == (inside(p, value) && p->taken[value]));
        return 1;
    case 13:
        value = fuzz_number(in);
        n = fuzz_number(in);
        compare_list(p, value, n > p->capacity + 1 ? p->capacity + 1 : n);
        return 1 + p->used;
    case 14:
        got = pb_plan(p->core, other->core);
        want = naive_room(p, 1) < 0 ? naive_room(p, 1) : naive_room(other, 1);
        if (!refused(got)) MUST(got == (want < 0 ? want : naive_acquire(p, 0) | naive_acquire(other, 0) << 32));
        MUST(pb_plan(p->core, p->core) == PB_EINVAL);
        return (p->capacity + other->capacity) / 64;
    default:
        n = fuzz_number(in);
        if (n > AT_ONCE && n <= PB_CAPACITY_MAX) n = AT_ONCE;
        plan_many(p, other, n);
        return n > 0 && n < p->capacity ? 2 * n : 1;
    }
}

static void compare(const pair *p, bool whole) {
    MUST(pb_index_count(p->core) == p->used);
    if (whole) compare_list(p, 0, p->used);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    fuzz_no_memory = false;
    pair pairs[2];
    for (int i = 0; i < 2; i++) pairs[i] = make_pair(&in, i);
    int64_t work = 0;
    for (int n = 0; n < STEPS && in.left > 0 && work < WORK; n++) {
        bool swap = *in.at & 0x10;
        work += step(&pairs[swap], &pairs[!swap], &in);
        for (int i = 0; i < 2; i++) compare(&pairs[i], pairs[i].capacity <= WHOLE);
    }
    for (int i = 0; i < 2; i++) {
        compare(&pairs[i], true);
        pb_index_free(pairs[i].core);
    }
    return 0;
}
