/*
 * internal.h - what the files of the core share among themselves and nobody else sees.
 *
 * pb_plan takes from two indexes at once and writes names in a row, so it needs the steps of an index with the
 * lock already held, and a name that can be stepped.
 */
#ifndef PYBLOCK_INTERNAL_H
#define PYBLOCK_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "pyblock.h"

/* What every pb_index begins with: its lock, which it may share with others. */
typedef struct {
    pthread_mutex_t *lock;
} pb_head;

static inline pthread_mutex_t *pb_lock_of(pb_index *index) {
    return ((pb_head *)index)->lock;
}

/* A default mutex that only its owner unlocks cannot fail, so no result is looked at. */
static inline void pb_lock(pb_index *index) {
    pthread_mutex_lock(pb_lock_of(index));
}

static inline void pb_unlock(pb_index *index) {
    pthread_mutex_unlock(pb_lock_of(index));
}

/* The three below want the lock held. */

/* Makes sure that the next n calls of pb_take_lowest succeed; returns 0.  PB_ERANGE: n < 0.  PB_EFULL, PB_ENOMEM. */
int64_t pb_prepare(pb_index *index, int64_t n);

/* Takes the lowest free index.  Only after pb_prepare. */
uint32_t pb_take_lowest(pb_index *index);

/* Gives back an index that is taken. */
void pb_give_back(pb_index *index, uint32_t value);

/*
 * A drive name and the '\n' behind it, which pb_name_next turns into the name that follows.
 *
 * Two things make a row of names fast.  The text is of a fixed size, so that it is copied whole: two moves, no call.
 * And the last letter, which nearly every step changes, is kept aside: a byte written into text would make the copy
 * that comes next wait for it.
 */
typedef struct {
    size_t prefix_len;
    size_t len; /* without the '\n' */
    char last;
    char text[PB_NAME_MAX + 1];
} pb_name;

/* Returns 0.  PB_ERANGE: number < 0.  PB_ETOOLONG. */
int64_t pb_name_set(pb_name *name, int64_t number, const char *prefix, size_t prefix_len);

/* Only while the name that follows is known to fit. */
void pb_name_next(pb_name *name);

/* Writes the name and its '\n'; returns their end.  Needs room for sizeof name->text bytes whatever the length. */
static inline char *pb_name_put(const pb_name *name, char *out) {
    memcpy(out, name->text, sizeof name->text);
    out[name->len - 1] = name->last;
    return out + name->len + 1;
}

/* Writes the address of index, which is at most PB_SCSI_INDEX_MAX; returns its length. */
size_t pb_put_scsi(char *out, uint32_t index);

#endif
