/*
 * fuzz_name.c - drive names and SCSI addresses, there and back.
 *
 * What parses must print as the same bytes, what prints must parse as the same number, and a batch
 * is its single texts in a row.  Where several faults apply at once the contract does not say which
 * is told, so any of them will do, and none when there is none.
 */
#include "fuzz.h"

enum { BATCH = 100 };

/* Faults are collected as bits: status -k is bit k. */
static bool among(int64_t got, unsigned faults) {
    return faults ? got < 0 && got > -32 && (faults >> -got & 1) != 0 : got >= 0;
}

static unsigned when(bool holds, int status) {
    return holds ? 1u << -status : 0;
}

static size_t letters(int64_t number, char *out) {
    size_t len = number < 26 ? 0 : letters(number / 26 - 1, out);
    out[len] = (char)('a' + number % 26);
    return len + 1;
}

/* The whole name, by recursion; 0 for a negative number. */
static size_t naive_name(int64_t number, const char *prefix, size_t prefix_len, char *out) {
    if (number < 0) return 0;
    if (prefix_len > 0) memcpy(out, prefix, prefix_len);
    return prefix_len + letters(number, out + prefix_len);
}

static void name_both_ways(int64_t number, const char *prefix, size_t prefix_len, size_t room) {
    char want[300];
    size_t len = naive_name(number, prefix, prefix_len, want);
    char *out = fuzz_block(room);
    int64_t got = pb_drive_name(number, prefix, prefix_len, out, room);
    MUST(among(got, when(number < 0, PB_ERANGE) | when(len > PB_NAME_MAX || len > room, PB_ETOOLONG)));
    if (got >= 0) {
        MUST((size_t)got == len && memcmp(out, want, len) == 0);
        MUST(pb_drive_index(out, len, prefix, prefix_len) == number);
    }
    free(out);
}

static void parse_name(const char *text, size_t len, const char *prefix, size_t prefix_len) {
    bool shaped = len <= PB_NAME_MAX && prefix_len < len && memcmp(text, prefix, prefix_len) == 0;
    int64_t number = -1;
    bool over = false;
    for (size_t i = prefix_len; shaped && i < len; i++) {
        shaped = text[i] >= 'a' && text[i] <= 'z';
        over = over || __builtin_add_overflow(number, 1, &number) || __builtin_mul_overflow(number, 26, &number) ||
               __builtin_add_overflow(number, text[i] - 'a', &number);
    }
    int64_t got = pb_drive_index(text, len, prefix, prefix_len);
    MUST(got == (!shaped ? PB_EINVAL : over ? PB_ERANGE : number));
    if (got >= 0) {
        char *out = fuzz_block(len);
        MUST(pb_drive_name(got, prefix, prefix_len, out, len) == (int64_t)len && memcmp(out, text, len) == 0);
        free(out);
    }
}

static void names_in_a_row(int64_t first, int64_t count, const char *prefix, size_t prefix_len, size_t room) {
    char want[300];
    bool negative = first < 0 || count < 0, past = !negative && count > 0 && first > INT64_MAX - (count - 1);
    unsigned faults = when(negative || past, PB_ERANGE);
    if (count > 0) {
        faults |= when(memchr(prefix, '\n', prefix_len) != NULL, PB_EINVAL);
        faults |= when((uint64_t)count > room / (PB_NAME_MAX + 1), PB_ETOOLONG);
        if (!negative && !past) faults |= when(naive_name(first + (count - 1), prefix, prefix_len, want) > PB_NAME_MAX, PB_ETOOLONG);
    }
    char *out = fuzz_block(room), *at = out;
    int64_t got = pb_drive_names(first, count, prefix, prefix_len, out, room);
    MUST(among(got, faults));
    if (got >= 0) {
        for (int64_t i = 0; i < count; i++) {
            size_t len = naive_name(first + i, prefix, prefix_len, want);
            MUST(out + got - at > (ptrdiff_t)len && memcmp(at, want, len) == 0 && at[len] == '\n');
            at += len + 1;
        }
        MUST(at == out + got);
    }
    free(out);
}

static void parse_address(const char *text, size_t len) {
    int64_t got = pb_scsi_index(text, len);
    MUST(got == PB_EINVAL || got == PB_ERANGE || (got >= 0 && got <= PB_SCSI_INDEX_MAX));
    if (got >= 0) {
        char *out = fuzz_block(len);
        MUST(pb_scsi_address(got, out, len) == (int64_t)len && memcmp(out, text, len) == 0);
        free(out);
    }
    /* A number too large is told from no number at all. */
    const char *colon = len > 0 ? memchr(text, ':', len) : NULL;
    bool shaped = colon != NULL;
    for (size_t i = 0; shaped && i < len; i++) shaped = text + i == colon || (text[i] >= '0' && text[i] <= '9');
    if (shaped) {
        size_t id = (size_t)(colon - text), lun = len - id - 1;
        shaped = id > 0 && lun > 0 && (id == 1 || text[0] != '0') && (lun == 1 || colon[1] != '0');
    }
    MUST((got == PB_EINVAL) == !shaped);
}

static void addresses_in_a_row(int64_t first, int64_t count, size_t room) {
    bool outside = first < 0 || count < 0 || (count > 0 && (first > PB_SCSI_INDEX_MAX || count > PB_SCSI_INDEX_MAX + 1 - first));
    unsigned faults = when(outside, PB_ERANGE);
    if (count > 0) faults |= when((uint64_t)count > room / (PB_SCSI_ADDRESS_MAX + 1), PB_ETOOLONG);
    char *out = fuzz_block(room), *at = out;
    int64_t got = pb_scsi_addresses(first, count, out, room);
    MUST(among(got, faults));
    for (int64_t i = 0; got >= 0 && i < count; i++) {
        char want[16], one[PB_SCSI_ADDRESS_MAX];
        int len = snprintf(want, sizeof want, "%d:%d\n", (int)((first + i) / 256), (int)((first + i) % 256));
        MUST(out + got - at >= len && memcmp(at, want, (size_t)len) == 0);
        MUST(pb_scsi_address(first + i, one, sizeof one) == len - 1 && memcmp(one, want, (size_t)len - 1) == 0);
        MUST(pb_scsi_index(at, (size_t)len - 1) == first + i);
        at += len;
    }
    if (got >= 0) MUST(at == out + got);
    free(out);

    size_t less = room % (PB_SCSI_ADDRESS_MAX + 1);
    out = fuzz_block(less);
    char want[16];
    bool exists = first >= 0 && first <= PB_SCSI_INDEX_MAX;
    size_t len = exists ? (size_t)snprintf(want, sizeof want, "%d:%d", (int)first / 256, (int)first % 256) : 0;
    MUST(pb_scsi_address(first, out, less) == (!exists ? PB_ERANGE : len > less ? PB_ETOOLONG : (int64_t)len));
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    uint64_t how = fuzz_word(&in, 1);
    int64_t first = fuzz_number(&in), count = how % 4 == 0 ? fuzz_number(&in) : (int64_t)fuzz_word(&in, 1) % BATCH;
    int64_t places = count >= 0 && count < BATCH ? count : (int64_t)fuzz_word(&in, 1) % BATCH;
    size_t name_room = (size_t)places * (PB_NAME_MAX + 1), address_room = (size_t)places * (PB_SCSI_ADDRESS_MAX + 1);
    if (how % 8 == 7) { /* one byte short, or any few more */
        name_room = name_room ? name_room - 1 : 0;
        address_room += (size_t)fuzz_word(&in, 1) % 8;
    }
    size_t prefix_len, text_len;
    char *prefix = fuzz_text(&in, 40, &prefix_len);
    char *text = fuzz_text(&in, 60, &text_len);

    name_both_ways(first, prefix, prefix_len, (size_t)places % 40);
    name_both_ways(first, prefix, prefix_len, PB_NAME_MAX);
    names_in_a_row(first, count, prefix, prefix_len, name_room);
    parse_name(text, text_len, prefix, prefix_len);
    /* a prefix that is sure to fit */
    parse_name(text, text_len, text, text_len < prefix_len ? text_len : prefix_len);
    parse_address(text, text_len);
    addresses_in_a_row(first, count, address_room);
    free(prefix);
    free(text);
    return 0;
}
