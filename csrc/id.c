/*
 * id.c - drive IDs that fit where a VMM keeps them, without two devices ever sharing one unseen.
 *
 * Cutting an ID off, as the original does, gives two long device IDs with one beginning the same
 * drive ID.  So what is cut out is replaced by a digest of the whole.  The digest is SipHash-2-4
 * keyed with the salt: with another key it is another function, so two IDs that meet under one salt
 * do not go on meeting under the next, even when somebody chose them to meet.  IDs are saved with a
 * sandbox's state: the digest must never change.
 */
#include "internal.h"

/* the half of the key that is not the salt; any constant does */
#define KEY_HALF UINT64_C(0x707962d16c6f636b)

static uint64_t rotate(uint64_t word, int by) {
    return word << by | word >> (64 - by);
}

static void sip_rounds(uint64_t v[4], int rounds) {
    while (rounds-- > 0) {
        v[0] += v[1];
        v[2] += v[3];
        v[1] = rotate(v[1], 13) ^ v[0];
        v[3] = rotate(v[3], 16) ^ v[2];
        v[0] = rotate(v[0], 32);
        v[2] += v[1];
        v[0] += v[3];
        v[1] = rotate(v[1], 17) ^ v[2];
        v[3] = rotate(v[3], 21) ^ v[0];
        v[2] = rotate(v[2], 32);
    }
}

/* Up to 8 bytes, the first the lowest, so that every machine makes the same digest. */
static uint64_t read_word(const char *text, size_t len) {
    uint64_t word = 0;
    for (size_t i = 0; i < len; i++) word |= (uint64_t)(unsigned char)text[i] << (8 * i);
    return word;
}

static uint64_t siphash(const char *text, size_t len, uint64_t key0, uint64_t key1) {
    uint64_t v[4] = {
        key0 ^ UINT64_C(0x736f6d6570736575),
        key1 ^ UINT64_C(0x646f72616e646f6d),
        key0 ^ UINT64_C(0x6c7967656e657261),
        key1 ^ UINT64_C(0x7465646279746573),
    };
    for (size_t at = 0; at <= len; at += 8) {
        size_t left = len - at;
        uint64_t word = left >= 8 ? read_word(text + at, 8)
                                  : read_word(text + at, left) | (uint64_t)len << 56;
        v[3] ^= word;
        sip_rounds(v, 2);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    sip_rounds(v, 4);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* RFC 4648's alphabet in lower case: every VMM takes these in an ID. */
static void put_digest(char *out, uint64_t digest) {
    for (int i = PB_ID_DIGEST - 1; i >= 0; i--, digest >>= 5)
        out[i] = "abcdefghijklmnopqrstuvwxyz234567"[digest & 31];
}

int64_t pb_make_id(const char *kind, size_t kind_len, const char *id, size_t id_len, int64_t salt,
                   int64_t limit, char *out, size_t room) {
    if (kind_len == 0 || id_len == 0) return PB_EINVAL;
    if (salt < 0 || limit < 1 || (uint64_t)limit > room) return PB_ERANGE;
    size_t most = (size_t)limit;
    bool whole = kind_len < most && id_len <= most - kind_len - 1;
    if (!whole && (kind_len > most || most - kind_len < PB_ID_DIGEST + 2)) return PB_ETOOLONG;

    char *at = out;
    memcpy(at, kind, kind_len);
    at += kind_len;
    *at++ = '-';
    size_t keep = whole ? id_len : most - kind_len - 2 - PB_ID_DIGEST;
    /* The first byte left out must not be inside a character. */
    while (!whole && keep > 0 && ((unsigned char)id[keep] & 0xC0) == 0x80) keep--;
    memcpy(at, id, keep);
    at += keep;
    if (!whole) {
        *at++ = '.';
        put_digest(at, siphash(id, id_len, (uint64_t)salt, KEY_HALF));
        at += PB_ID_DIGEST;
    }
    return at - out;
}
