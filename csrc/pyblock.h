/*
 * pyblock.h - the whole C API of pyblock's core, and the only place where it is declared.
 *
 * The core turns small integers into what a drive needs (a block index, a name, an address, an ID)
 * and knows nothing of devices, sandboxes or virtual machines.  Three rules hold for every
 * function:
 *
 *   - It returns a value >= 0, or one of the negative PB_E... statuses; on a negative status no
 *     index is taken or given back that was not before.  What stands in the caller's buffers is
 *     then of no meaning.
 *   - It keeps no memory of its own between calls and writes only to what the caller passed, so any
 *     number of threads may call it at once.  A pb_index locks itself, and a fork waits until no
 *     thread is inside one: a child may use what it inherited.
 *   - Text has a length and no terminating NUL, both in and out.  It is bytes; only pb_make_id
 *     looks for UTF-8.  Where many texts go in or out at once, each is followed by '\n', so none
 *     may hold one.
 *
 * An index, a buffer or a text passed in is never NULL unless it says so.
 *
 * The cffi build (pyblock/core/_native_build.py) reads the region between the two marks as its
 * declarations.  What stands there must therefore be plain C declarations and #defines of whole
 * numbers.
 */
#ifndef PYBLOCK_H
#define PYBLOCK_H

#include <stddef.h>
#include <stdint.h>

/* >>> cffi */

/* Statuses. */
#define PB_EINVAL -1   /* malformed text, or an argument no caller should pass */
#define PB_ERANGE -2   /* a number outside the range that the function names */
#define PB_EFULL -3    /* every index up to the capacity is taken */
#define PB_ETAKEN -4   /* the index to reserve is taken already */
#define PB_EFREE -5    /* the index to release is free already */
#define PB_ENOMEM -6   /* no memory */
#define PB_ETOOLONG -7 /* the text does not fit into the room given */

/* Limits. */
#define PB_CAPACITY_MAX 1048576   /* 2^20: the largest capacity of a pb_index */
#define PB_CAPACITY_DEFAULT 65536 /* one sandbox: 256 SCSI targets of 256 LUNs each */
#define PB_NAME_MAX 31 /* bytes of a drive name: Linux's DISK_NAME_LEN (32) less the NUL */
/* "255:255": a SCSI ID and a LUN of a byte each, as Kata numbers them */
#define PB_SCSI_INDEX_MAX 65535
#define PB_SCSI_ADDRESS_MAX 7     /* bytes of "255:255" */
#define PB_ID_MAX 31              /* bytes of a drive ID: QEMU's node names hold 31 */
#define PB_ID_DIGEST 13 /* bytes that stand for what was cut out of an ID: 64 bits in base 32 */

/*
 * The block index: hands out the lowest free integer of 0 ... capacity - 1.
 *
 * A bitmap of three levels, grown as high indexes come into use (a bit for each index up to the
 * highest ever taken) and never shrunk; while all taken are below 64 it needs no memory but the
 * struct.  Acquire, release and test touch three words whatever the occupancy; growing doubles, so
 * it is paid once.
 * All but pb_index_free may be called from many threads at once.
 */
typedef struct pb_index pb_index;

/*
 * A new index with all of 0 ... capacity - 1 free; NULL when capacity is not in
 * 1 ... PB_CAPACITY_MAX or memory is out.
 */
pb_index *pb_index_new(int64_t capacity);

/* Ends an index.  No other thread may be using it.  NULL is allowed. */
void pb_index_free(pb_index *index);

/* Takes the lowest free index and returns it.  PB_EFULL, PB_ENOMEM. */
int64_t pb_index_acquire(pb_index *index);

/*
 * Takes the n lowest free indexes into out[0 ... n-1], ascending; returns n.  All or none.
 * PB_EFULL, PB_ENOMEM; PB_ERANGE: n < 0.
 */
int64_t pb_index_acquire_many(pb_index *index, int64_t n, uint32_t *out);

/*
 * Takes one given index; returns it.  PB_ERANGE (not in 0 ... capacity - 1), PB_ETAKEN, PB_ENOMEM.
 */
int64_t pb_index_reserve(pb_index *index, int64_t value);

/*
 * Takes the n given indexes, in any order; returns n.  All or none.  When one is out of range,
 * taken, or named twice, *bad (bad may be NULL) is the position of the first such and the status
 * PB_ERANGE or PB_ETAKEN.  Also PB_ENOMEM and, for n < 0, PB_ERANGE; *bad is then -1, as it is on
 * success.
 */
int64_t pb_index_reserve_many(pb_index *index, int64_t n, const int64_t *values, int64_t *bad);

/* Gives one index back; returns it.  PB_ERANGE, PB_EFREE. */
int64_t pb_index_release(pb_index *index, int64_t value);

/* 1 when the index is taken, else 0 (also when it is out of range). */
int64_t pb_index_test(pb_index *index, int64_t value);

/* How many indexes are taken. */
int64_t pb_index_count(pb_index *index);

/* The capacity given to pb_index_new. */
int64_t pb_index_capacity(pb_index *index);

/*
 * Writes up to n taken indexes >= from into out, ascending; returns how many.  One consistent
 * picture per call.  PB_ERANGE: n < 0.
 */
int64_t pb_index_list(pb_index *index, int64_t from, int64_t n, uint32_t *out);

/* Bytes of memory that the index holds now, the struct included. */
int64_t pb_index_memory(pb_index *index);

/*
 * Drive names: base 26 without a zero behind a prefix.  With "vd": 0 vda, 25 vdz, 26 vdaa, 701
 * vdzz, 702 vdaaa.  The whole name has at most PB_NAME_MAX bytes.  A prefix is any text of at most
 * PB_NAME_MAX - 1 bytes.
 */

/*
 * Writes the name of number into out; returns its length.  PB_ERANGE: number < 0.  PB_ETOOLONG:
 * longer than PB_NAME_MAX or room.
 */
int64_t pb_drive_name(int64_t number, const char *prefix, size_t prefix_len, char *out,
                      size_t room);

/*
 * Writes the names of first ... first + count - 1, each followed by '\n'; returns the bytes
 * written.  PB_ERANGE: first or count < 0, or the last number overflows.  PB_EINVAL: a '\n' in
 * prefix.  PB_ETOOLONG: the last name is longer than PB_NAME_MAX, or room is less than
 * count * (PB_NAME_MAX + 1).
 */
int64_t pb_drive_names(int64_t first, int64_t count, const char *prefix, size_t prefix_len,
                       char *out, size_t room);

/*
 * The number of a name.  PB_EINVAL: another prefix, no letters, other than a-z, or over PB_NAME_MAX
 * bytes.  PB_ERANGE: over INT64_MAX.
 */
int64_t pb_drive_index(const char *name, size_t name_len, const char *prefix, size_t prefix_len);

/*
 * SCSI addresses: "id:lun" with id = index / 256 and lun = index % 256, index in
 * 0 ... PB_SCSI_INDEX_MAX.
 */

/* Writes the address of index into out; returns its length.  PB_ERANGE; PB_ETOOLONG. */
int64_t pb_scsi_address(int64_t index, char *out, size_t room);

/*
 * Writes the addresses of first ... first + count - 1, each followed by '\n'; returns the bytes
 * written.  PB_ERANGE: first or count < 0, or the last is out of range.  PB_ETOOLONG: room is less
 * than count * (PB_SCSI_ADDRESS_MAX + 1).
 */
int64_t pb_scsi_addresses(int64_t first, int64_t count, char *out, size_t room);

/*
 * The index of an address in the one spelling that pb_scsi_address writes: no sign, no space, no
 * leading zero.  PB_EINVAL: another spelling.  PB_ERANGE: a part over 255.
 */
int64_t pb_scsi_index(const char *address, size_t address_len);

/*
 * Drive IDs: kind, '-', id, in at most limit bytes (1 ... room).
 *
 * What fits is written as it is.  What does not keeps kind, '-' and the longest beginning of id
 * that leaves room for '.' and PB_ID_DIGEST bytes, a digest of the whole id and of salt; a UTF-8
 * character is kept whole or dropped.  Two IDs that were shortened may meet only when their 64-bit
 * digests do; the caller, who knows the IDs in use, then asks again with another salt.  salt does
 * not matter where nothing is shortened.  The text for given arguments never changes from one
 * version to the next: IDs are saved.
 * Returns the length.  PB_EINVAL: kind or id empty.  PB_ERANGE: salt < 0, or limit not in
 * 1 ... room.  PB_ETOOLONG: it must be shortened, and kind, '-', '.' and digest do not fit.
 */
int64_t pb_make_id(const char *kind, size_t kind_len, const char *id, size_t id_len, int64_t salt,
                   int64_t limit, char *out, size_t room);

/*
 * Plan: the numbers that a drive is given before it is plugged in, in one crossing.
 *
 * index hands out block indexes, ordinals the numbers behind the names of one family of drives (sd,
 * vd, pmem).  The two must not be the same object (PB_EINVAL).  Both are locked together, in an
 * order of the core's, so any two may be named in any order by any number of threads.
 */

/*
 * Takes one of each; returns ordinal << 32 | index.  PB_EFULL (either; none is then taken),
 * PB_ENOMEM, PB_EINVAL.
 */
int64_t pb_plan(pb_index *index, pb_index *ordinals);

/*
 * The same for n drives, into indexes[] and numbers[]; returns n.  All or none.  PB_EFULL,
 * PB_ENOMEM, PB_EINVAL; PB_ERANGE: n < 0.
 */
int64_t pb_plan_many(pb_index *index, pb_index *ordinals, int64_t n, uint32_t *indexes,
                     uint32_t *numbers);

/* <<< cffi */

#endif
