/*
 * test_text.c - names, SCSI addresses and IDs.  The naive Python oracle looks at every number; here
 * are the edges, and buffers of exactly the size needed, so that a sanitizer sees one byte too
 * many.
 */
#include <stdlib.h>

#include "check.h"

bool test_name_examples(void) {
    const struct {
        int64_t number;
        const char *name;
    } examples[] = {
        {0, "vda"}, {25, "vdz"}, {26, "vdaa"}, {51, "vdaz"}, {52, "vdba"}, {701, "vdzz"}, {702, "vdaaa"}, {703, "vdaab"}, {18277, "vdzzz"},
        {18278, "vdaaaa"}, {INT64_MAX - 1, "vdcrpxnlskvljfhg"}, {INT64_MAX, "vdcrpxnlskvljfhh"},
    };
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        char out[PB_NAME_MAX];
        int64_t len = pb_drive_name(examples[i].number, TEXT("vd"), out, sizeof out);
        CHECK(same(out, len, examples[i].name));
        CHECK(pb_drive_index(out, (size_t)len, TEXT("vd")) == examples[i].number);
    }
    return true;
}

bool test_name_steps_and_inverse(void) {
    enum { COUNT = 500000 };
    char *out = malloc(COUNT * (PB_NAME_MAX + 1)), one[PB_NAME_MAX];
    CHECK(out);
    const char *at = out, *end = out + pb_drive_names(0, COUNT, TEXT("sd"), out, COUNT * (PB_NAME_MAX + 1));
    for (int64_t i = 0; i < COUNT; i++) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        CHECK(stop && pb_drive_name(i, TEXT("sd"), one, sizeof one) == stop - at && memcmp(one, at, (size_t)(stop - at)) == 0);
        CHECK(pb_drive_index(at, (size_t)(stop - at), TEXT("sd")) == i);
        at = stop + 1;
    }
    CHECK(at == end);
    free(out);
    return true;
}

bool test_name_limits(void) {
    char out[2 * (PB_NAME_MAX + 1)], prefix[PB_NAME_MAX + 1];
    memset(prefix, 'p', sizeof prefix);
    CHECK(pb_drive_name(25, prefix, PB_NAME_MAX - 1, out, sizeof out) == PB_NAME_MAX && out[PB_NAME_MAX - 1] == 'z');
    CHECK(pb_drive_index(out, PB_NAME_MAX, prefix, PB_NAME_MAX - 1) == 25);
    CHECK(pb_drive_name(26, prefix, PB_NAME_MAX - 1, out, sizeof out) == PB_ETOOLONG);
    CHECK(pb_drive_name(0, prefix, PB_NAME_MAX, out, sizeof out) == PB_ETOOLONG);
    CHECK(pb_drive_name(0, prefix, SIZE_MAX, out, sizeof out) == PB_ETOOLONG);
    CHECK(pb_drive_name(0, TEXT("vd"), out, 2) == PB_ETOOLONG && pb_drive_name(0, TEXT("vd"), out, 3) == 3);
    CHECK(pb_drive_name(-1, TEXT("vd"), out, sizeof out) == PB_ERANGE &&
          pb_drive_name(INT64_MIN, TEXT("vd"), out, sizeof out) == PB_ERANGE);
    CHECK(same(out, pb_drive_name(26, TEXT(""), out, sizeof out), "aa"));

    CHECK(pb_drive_names(0, 0, TEXT("vd"), out, 0) == 0);
    CHECK(pb_drive_names(-1, 1, TEXT("vd"), out, sizeof out) == PB_ERANGE &&
          pb_drive_names(0, -1, TEXT("vd"), out, sizeof out) == PB_ERANGE);
    CHECK(pb_drive_names(INT64_MAX, 2, TEXT("vd"), out, sizeof out) == PB_ERANGE);
    CHECK(same(out, pb_drive_names(INT64_MAX, 1, TEXT("vd"), out, sizeof out), "vdcrpxnlskvljfhh\n"));
    CHECK(pb_drive_names(1, INT64_MAX, TEXT("vd"), out, sizeof out) == PB_ETOOLONG);
    CHECK(pb_drive_names(0, 2, TEXT("vd"), out, sizeof out - 1) == PB_ETOOLONG);
    CHECK(pb_drive_names(0, 1, TEXT("v\nd"), out, sizeof out) == PB_EINVAL);
    CHECK(pb_drive_names(24, 2, prefix, PB_NAME_MAX - 1, out, sizeof out) == (int64_t)sizeof out);
    CHECK(pb_drive_names(25, 2, prefix, PB_NAME_MAX - 1, out, sizeof out) == PB_ETOOLONG);
    CHECK(same(out, pb_drive_names(701, 2, TEXT(""), out, sizeof out), "zz\naaa\n"));
    return true;
}

bool test_name_malformed(void) {
    const struct {
        const char *name;
        size_t len;
        int64_t status;
    } cases[] = {
        {TEXT(""), PB_EINVAL}, {TEXT("v"), PB_EINVAL}, {TEXT("vd"), PB_EINVAL}, {TEXT("sda"), PB_EINVAL}, {TEXT("vdA"), PB_EINVAL},
        {TEXT("vda1"), PB_EINVAL}, {TEXT("vda\n"), PB_EINVAL}, {TEXT("vd a"), PB_EINVAL}, {TEXT("vd\0a"), PB_EINVAL},
        {TEXT("vda\0"), PB_EINVAL},
        {TEXT("vd`"), PB_EINVAL}, {TEXT("vd{"), PB_EINVAL}, {TEXT("vd\xc3\xa9"), PB_EINVAL}, {TEXT("/dev/vda"), PB_EINVAL},
        {TEXT("vdcrpxnlskvljfhi"), PB_ERANGE}, {TEXT("vdzzzzzzzzzzzzzz"), PB_ERANGE}, {TEXT("vdaaaaaaaaaaaaaaa"), PB_ERANGE},
        {TEXT("vdzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"), PB_ERANGE}, {TEXT("vdaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"), PB_EINVAL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK(pb_drive_index(cases[i].name, cases[i].len, TEXT("vd")) == cases[i].status);
    }
    return true;
}

bool test_scsi_every_index(void) {
    enum { COUNT = PB_SCSI_INDEX_MAX + 1, ROOM = COUNT * (PB_SCSI_ADDRESS_MAX + 1) };
    char *out = malloc(ROOM), want[32], one[PB_SCSI_ADDRESS_MAX];
    CHECK(out);
    int64_t all = pb_scsi_addresses(0, COUNT, out, ROOM);
    const char *at = out;
    for (int i = 0; i < COUNT; i++) {
        int len = snprintf(want, sizeof want, "%d:%d\n", i / 256, i % 256) - 1;
        CHECK(memcmp(at, want, (size_t)len + 1) == 0);
        CHECK(pb_scsi_address(i, one, (size_t)len) == len && memcmp(one, want, (size_t)len) == 0);
        CHECK(pb_scsi_address(i, one, (size_t)len - 1) == PB_ETOOLONG);
        CHECK(pb_scsi_index(at, (size_t)len) == i);
        at += len + 1;
    }
    CHECK(at - out == all);
    CHECK(pb_scsi_address(-1, out, ROOM) == PB_ERANGE && pb_scsi_address(COUNT, out, ROOM) == PB_ERANGE);
    CHECK(pb_scsi_addresses(-1, 1, out, ROOM) == PB_ERANGE && pb_scsi_addresses(0, -1, out, ROOM) == PB_ERANGE);
    CHECK(pb_scsi_addresses(1, COUNT, out, ROOM) == PB_ERANGE && pb_scsi_addresses(INT64_MAX, INT64_MAX, out, ROOM) == PB_ERANGE);
    CHECK(pb_scsi_addresses(0, COUNT, out, ROOM - 1) == PB_ETOOLONG && pb_scsi_addresses(5, 0, out, 0) == 0);
    free(out);
    return true;
}

bool test_scsi_malformed(void) {
    const struct {
        const char *address;
        size_t len;
        int64_t status;
    } cases[] = {
        {TEXT(""), PB_EINVAL}, {TEXT(":"), PB_EINVAL}, {TEXT("1"), PB_EINVAL}, {TEXT("1:"), PB_EINVAL}, {TEXT(":1"), PB_EINVAL},
        {TEXT("01:1"), PB_EINVAL}, {TEXT("1:01"), PB_EINVAL}, {TEXT("00:0"), PB_EINVAL}, {TEXT("+1:1"), PB_EINVAL},
        {TEXT("-1:1"), PB_EINVAL},
        {TEXT("1:1 "), PB_EINVAL}, {TEXT(" 1:1"), PB_EINVAL}, {TEXT("1:1\n"), PB_EINVAL}, {TEXT("1:1\0"), PB_EINVAL},
        {TEXT("1:1:1"), PB_EINVAL},
        {TEXT("\xd9\xa1:0"), PB_EINVAL}, {TEXT("0x1:0"), PB_EINVAL}, {TEXT("256:x"), PB_EINVAL}, {TEXT("999:01"), PB_EINVAL},
        {TEXT("256:0"), PB_ERANGE}, {TEXT("0:256"), PB_ERANGE}, {TEXT("99999999999999999999999999:0"), PB_ERANGE},
        {TEXT("0:18446744073709551616"), PB_ERANGE}, {TEXT("255:255"), PB_SCSI_INDEX_MAX}, {TEXT("2:191"), 703}, {TEXT("0:0"), 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) CHECK(pb_scsi_index(cases[i].address, cases[i].len) == cases[i].status);
    return true;
}

bool test_id_fits(void) {
    char out[PB_ID_MAX];
    CHECK(same(out, pb_make_id(TEXT("drive"), TEXT("a"), 0, 31, out, 31), "drive-a"));
    CHECK(same(out, pb_make_id(TEXT("drive"), TEXT("a"), 9, 7, out, 7), "drive-a"));
    CHECK(same(out, pb_make_id(TEXT("drive"), TEXT("1234567890123456789012345"), 0, 31, out, 31), "drive-1234567890123456789012345"));
    CHECK(pb_make_id(TEXT("k"), TEXT("\0\n\xff"), 0, 31, out, 31) == 5 && memcmp(out, "k-\0\n\xff", 5) == 0);
    return true;
}

static int64_t shorten(const char *id, size_t id_len, int64_t salt, char *out) {
    return pb_make_id(TEXT("drive"), id, id_len, salt, PB_ID_MAX, out, PB_ID_MAX);
}

bool test_id_shortened(void) {
    char a[PB_ID_MAX], b[PB_ID_MAX];
    CHECK(shorten(TEXT("12345678901234567890123456"), 0, a) == 31);
    CHECK(memcmp(a, "drive-12345678901.", 18) == 0);
    /* Another end, another salt: another digest. */
    CHECK(shorten(TEXT("12345678901234567890123457"), 0, b) == 31 && memcmp(a, b, 31) != 0);
    CHECK(shorten(TEXT("12345678901234567890123456"), 1, b) == 31 && memcmp(a, b, 31) != 0);
    CHECK(shorten(TEXT("12345678901234567890123456"), 0, b) == 31 && memcmp(a, b, 31) == 0);
    /* A character of two, three or four bytes is kept whole or dropped. */
    CHECK(shorten(TEXT("1234567890\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"), 0, b) == 30);
    CHECK(memcmp(b, "drive-1234567890.", 17) == 0);
    CHECK(shorten(TEXT("123456789\xc3\xa9\xe2\x82\xac\xe2\x82\xac\xe2\x82\xac\xe2\x82\xac\xe2\x82\xac"), 0, b) == 31);
    CHECK(memcmp(b, "drive-123456789\xc3\xa9.", 18) == 0);
    CHECK(shorten(TEXT("12345678\xf0\x9f\x92\xbf\xf0\x9f\x92\xbf\xf0\x9f\x92\xbf\xf0\x9f\x92\xbf\xf0\x9f\x92\xbf"), 0, b) == 28);
    /* Bytes that are no UTF-8 at all are no reason to read before the start. */
    char odd[40];
    memset(odd, 0x80, sizeof odd);
    CHECK(shorten(odd, sizeof odd, 0, b) == 6 + 1 + PB_ID_DIGEST);
    return true;
}

bool test_id_limits(void) {
    char *out = malloc(20);
    CHECK(out);
    CHECK(pb_make_id(TEXT("drive"), TEXT("123456789012345"), 0, 20, out, 20) == 20 && memcmp(out, "drive-.", 7) == 0);
    CHECK(pb_make_id(TEXT("drive"), TEXT("12345678901234"), 0, 20, out, 20) == 20 && out[6] == '1');
    CHECK(pb_make_id(TEXT("drive"), TEXT("123456789012345"), 0, 19, out, 20) == PB_ETOOLONG);
    CHECK(pb_make_id(TEXT("a kind of far too many letters"), TEXT("1"), 0, 20, out, 20) == PB_ETOOLONG);
    CHECK(pb_make_id(TEXT("drive"), TEXT("1"), 0, 6, out, 20) == PB_ETOOLONG && pb_make_id(TEXT("drive"), TEXT("1"), 0, 7, out, 20) == 7);
    CHECK(pb_make_id(TEXT("drive"), TEXT("1"), 0, 21, out, 20) == PB_ERANGE &&
          pb_make_id(TEXT("drive"), TEXT("1"), 0, 0, out, 20) == PB_ERANGE);
    CHECK(pb_make_id(TEXT("drive"), TEXT("1"), -1, 20, out, 20) == PB_ERANGE &&
          pb_make_id(TEXT("drive"), TEXT("1"), INT64_MAX, 20, out, 20) == 7);
    CHECK(pb_make_id(TEXT(""), TEXT("1"), 0, 20, out, 20) == PB_EINVAL && pb_make_id(TEXT("drive"), TEXT(""), 0, 20, out, 20) == PB_EINVAL);
    free(out);
    return true;
}

/* IDs are saved: these must be the same for ever. */
bool test_id_known_digests(void) {
    char out[PB_ID_MAX];
    CHECK(same(out, pb_make_id(TEXT("drive"), TEXT("bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"), 0, 31, out, 31),
               "drive-bbbbbbbbbbb.midxenbbwxn4d"));
    CHECK(same(out, pb_make_id(TEXT("drive"), TEXT("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"), 0, 20, out, 20),
               "drive-.bbn72txu2wlol"));
    return true;
}
