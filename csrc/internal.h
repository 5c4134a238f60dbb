/*
 * internal.h - what the files of the core share among themselves and nobody else sees.
 *
 * pb_plan takes from two indexes at once, so it needs the steps of an index with the lock already
 * held.
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

/* The two below want the lock held. */

/*
 * Makes sure that the next n calls of pb_take_lowest succeed; returns 0.  PB_ERANGE: n < 0.
 * PB_EFULL, PB_ENOMEM.
 */
int64_t pb_prepare(pb_index *index, int64_t n);

/* Takes the lowest free index.  Only after pb_prepare. */
uint32_t pb_take_lowest(pb_index *index);

#endif
