/*
 * fuzz_id.c - drive IDs from arbitrary bytes.
 *
 * An ID that fits is verbatim; one that does not keeps the longest beginning that cuts no character
 * of valid UTF-8.
 */
#include "fuzz.h"

/*
 * How many bytes the character at text has; 0 where no valid one begins.  RFC 3629, table by table.
 */
static size_t character(const unsigned char *text, size_t len) {
    unsigned char a = text[0], low = 0x80, high = 0xBF;
    if (a < 0x80) return 1;
    size_t more = a >= 0xC2 && a <= 0xDF ? 1 : a >= 0xE0 && a <= 0xEF ? 2 : a >= 0xF0 && a <= 0xF4 ? 3 : 0;
    if (more == 0 || more >= len) return 0;
    if (a == 0xE0) low = 0xA0;
    if (a == 0xED) high = 0x9F;
    if (a == 0xF0) low = 0x90;
    if (a == 0xF4) high = 0x8F;
    for (size_t i = 1; i <= more; i++, low = 0x80, high = 0xBF) {
        if (text[i] < low || text[i] > high) return 0;
    }
    return more + 1;
}

/*
 * The end of the last character that ends at or before most, or len + 1 when the text is not valid
 * UTF-8.
 */
static size_t whole_characters(const char *text, size_t len, size_t most) {
    size_t kept = 0;
    for (size_t at = 0; at < len;) {
        size_t bytes = character((const unsigned char *)text + at, len - at);
        if (bytes == 0) return len + 1;
        at += bytes;
        if (at <= most) kept = at;
    }
    return kept;
}

/*
 * Makes the ID into a block of limit bytes, or of nothing when it is refused; checks all but the
 * digest's value.
 */
static int64_t make(const char *kind, size_t kind_len, const char *id, size_t id_len, int64_t salt, int64_t limit, char *out, size_t room) {
    int64_t got = pb_make_id(kind, kind_len, id, id_len, salt, limit, out, room);
    if (kind_len == 0 || id_len == 0) {
        MUST(got == PB_EINVAL || (got == PB_ERANGE && (salt < 0 || limit < 1 || (uint64_t)limit > room)));
        return got;
    }
    if (salt < 0 || limit < 1 || (uint64_t)limit > room) {
        MUST(got == PB_ERANGE);
        return got;
    }
    size_t most = (size_t)limit;
    if (kind_len + 1 + id_len <= most) {
        MUST((size_t)got == kind_len + 1 + id_len && memcmp(out + kind_len + 1, id, id_len) == 0);
    } else if (kind_len + 2 + PB_ID_DIGEST > most) {
        MUST(got == PB_ETOOLONG);
        return got;
    } else {
        MUST(got > 0 && (size_t)got >= kind_len + 2 + PB_ID_DIGEST && (size_t)got <= most);
        size_t kept = (size_t)got - kind_len - 2 - PB_ID_DIGEST;
        size_t whole = whole_characters(id, id_len, most - kind_len - 2 - PB_ID_DIGEST);
        MUST(kept < id_len && memcmp(out + kind_len + 1, id, kept) == 0 && (whole > id_len || kept == whole));
        const char *digest = out + kind_len + 1 + kept;
        MUST(*digest++ == '.');
        for (int i = 0; i < PB_ID_DIGEST; i++) MUST((digest[i] >= 'a' && digest[i] <= 'z') || (digest[i] >= '2' && digest[i] <= '7'));
    }
    MUST(memcmp(out, kind, kind_len) == 0 && out[kind_len] == '-');
    return got;
}

/*
 * A valid text of up to most bytes, a character for each of the fuzzer's bytes: arbitrary bytes
 * seldom are one.
 */
static char *valid_text(fuzz_input *in, size_t most, size_t *len) {
    static const char *const characters[] = {"x", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x92\xBE"};
    char text[256];
    *len = 0;
    for (size_t n = (size_t)fuzz_word(in, 1) % 64; n > 0; n--) {
        const char *one = characters[fuzz_word(in, 1) % 4];
        if (*len + strlen(one) > most) break;
        memcpy(text + *len, one, strlen(one));
        *len += strlen(one);
    }
    char *block = fuzz_block(*len);
    if (*len > 0) memcpy(block, text, *len);
    return block;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input input = {data, size}, *in = &input;
    fuzz_no_memory = false;
    size_t kind_len, id_len;
    char *kind = fuzz_text(in, 40, &kind_len);
    char *id = fuzz_word(in, 1) % 2 ? valid_text(in, 120, &id_len) : fuzz_text(in, 120, &id_len);
    int64_t salt = fuzz_number(in), limit = (int64_t)fuzz_word(in, 1);
    size_t room = (size_t)limit;
    switch (limit % 4) { /* three in four as a drive asks for it; the rest by any limit and room */
    case 0:
        limit = fuzz_number(in);
        room = (size_t)fuzz_word(in, 1);
        if (limit > 0 && limit < 256 && room % 2) room = (size_t)limit;
        break;
    case 1: break;
    default: limit = PB_ID_MAX, room = PB_ID_MAX;
    }
    char *out = fuzz_block(room), *again = fuzz_block(room);
    int64_t got = make(kind, kind_len, id, id_len, salt, limit, out, room);
    MUST(make(kind, kind_len, id, id_len, salt, limit, again, room) == got);
    if (got > 0) {
        MUST(memcmp(out, again, (size_t)got) == 0);
        bool shortened = kind_len + 1 + id_len > (size_t)limit;
        /*
         * Another salt, and another ID whose change may lie in what was cut out: other digests, and
         * nothing else's.
         */
        MUST(make(kind, kind_len, id, id_len, salt ^ 1, limit, again, room) == got);
        MUST((memcmp(out, again, (size_t)got) != 0) == shortened);
        id[(uint64_t)salt % id_len] ^= 1;
        int64_t other = make(kind, kind_len, id, id_len, salt, limit, again, room);
        MUST(other != got || memcmp(out, again, (size_t)got) != 0);
    }
    free(kind), free(id), free(out), free(again);
    return 0;
}
