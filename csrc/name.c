/*
 * name.c - drive names, as Linux numbers its disks: base 26 without a zero, so that after z comes
 * aa and not ba.
 *
 * A single name is built from its last letter to its first.  A batch builds only its first name
 * that way and steps from each to the next, which in 25 of 26 cases changes one letter and divides
 * nothing.
 */
#include "internal.h"

#define LETTERS_MAX 14 /* of INT64_MAX */

/*
 * A drive name and the '\n' behind it, which name_next turns into the name that follows.
 *
 * Two things make a row of names fast.  The text is of a fixed size, so that it is copied whole:
 * two moves, no call.  And the last letter, which nearly every step changes, is kept aside: a byte
 * written into text would make the copy that comes next wait for it.
 */
typedef struct {
    size_t prefix_len;
    size_t len; /* without the '\n' */
    char last;
    char text[PB_NAME_MAX + 1];
} drive_name;

/* Returns 0.  PB_ERANGE: number < 0.  PB_ETOOLONG. */
static int64_t name_set(drive_name *name, int64_t number, const char *prefix, size_t prefix_len) {
    if (number < 0) return PB_ERANGE;
    char letters[LETTERS_MAX];
    size_t at = LETTERS_MAX;
    /* left counts from 1, since a digit here is worth 1 to 26. */
    for (uint64_t left = (uint64_t)number + 1; left > 0; left /= 26)
        letters[--at] = (char)('a' + (int)(--left % 26));
    size_t count = LETTERS_MAX - at;
    if (prefix_len > PB_NAME_MAX - count) return PB_ETOOLONG;

    *name = (drive_name){.prefix_len = prefix_len, .len = prefix_len + count};
    if (prefix_len > 0) memcpy(name->text, prefix, prefix_len);
    memcpy(name->text + prefix_len, letters + at, count);
    name->text[name->len] = '\n';
    name->last = name->text[name->len - 1];
    return 0;
}

/* Only while the name that follows is known to fit. */
static void name_next(drive_name *name) {
    if (name->last != 'z') {
        name->last++;
        return;
    }
    size_t at = name->len - 1;
    name->last = name->text[at] = 'a';
    while (at > name->prefix_len && name->text[at - 1] == 'z') name->text[--at] = 'a';
    if (at > name->prefix_len) {
        name->text[at - 1]++;
    } else { /* it was all z and is all a now: one more letter */
        name->text[name->len++] = 'a';
        name->text[name->len] = '\n';
    }
}

/*
 * Writes the name and its '\n'; returns their end.  Needs room for sizeof name->text bytes whatever
 * the length.
 */
static char *name_put(const drive_name *name, char *out) {
    memcpy(out, name->text, sizeof name->text);
    out[name->len - 1] = name->last;
    return out + name->len + 1;
}

int64_t pb_drive_name(int64_t number, const char *prefix, size_t prefix_len, char *out,
                      size_t room) {
    drive_name name;
    int64_t status = name_set(&name, number, prefix, prefix_len);
    if (status < 0) return status;
    if (name.len > room) return PB_ETOOLONG;
    memcpy(out, name.text, name.len);
    return (int64_t)name.len;
}

int64_t pb_drive_names(int64_t first, int64_t count, const char *prefix, size_t prefix_len,
                       char *out, size_t room) {
    if (first < 0 || count < 0) return PB_ERANGE;
    if (count == 0) return 0;
    if (first > INT64_MAX - (count - 1)) return PB_ERANGE;
    if (prefix_len > 0 && memchr(prefix, '\n', prefix_len)) return PB_EINVAL;
    if ((uint64_t)count > room / (PB_NAME_MAX + 1)) return PB_ETOOLONG;

    drive_name name;
    /* the last fits: so do all */
    int64_t status = name_set(&name, first + (count - 1), prefix, prefix_len);
    if (status < 0) return status;
    name_set(&name, first, prefix, prefix_len);
    char *at = out;
    for (int64_t left = count; left > 0; left--) {
        at = name_put(&name, at);
        if (left > 1) name_next(&name);
    }
    return at - out;
}

int64_t pb_drive_index(const char *name, size_t name_len, const char *prefix, size_t prefix_len) {
    if (name_len > PB_NAME_MAX || prefix_len >= name_len) return PB_EINVAL;
    if (prefix_len > 0 && memcmp(name, prefix, prefix_len) != 0) return PB_EINVAL;
    for (size_t i = prefix_len; i < name_len; i++) {
        if (name[i] < 'a' || name[i] > 'z') return PB_EINVAL;
    }
    uint64_t number = 0; /* counts from 1 */
    for (size_t i = prefix_len; i < name_len; i++) {
        uint64_t digit = (uint64_t)(name[i] - 'a');
        if (number > ((uint64_t)INT64_MAX - digit) / 26) return PB_ERANGE;
        number = number * 26 + digit + 1;
    }
    return (int64_t)(number - 1);
}
