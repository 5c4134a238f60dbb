/*
 * scsi.c - SCSI addresses "id:lun", an index written as two bytes in decimal.
 *
 * There is exactly one spelling of each address, so that texts can be compared instead of numbers.
 */
#include "internal.h"

/* Writes a number of 0 ... 255; returns its end. */
static char *put_byte(char *out, uint32_t number) {
    if (number >= 100) {
        *out++ = (char)('0' + number / 100);
        number %= 100;
        *out++ = (char)('0' + number / 10);
    } else if (number >= 10) {
        *out++ = (char)('0' + number / 10);
    }
    *out++ = (char)('0' + number % 10);
    return out;
}

/* Writes the address of index, which is at most PB_SCSI_INDEX_MAX; returns its length. */
static size_t put_address(char *out, uint32_t index) {
    char *end = put_byte(out, index / 256);
    *end++ = ':';
    return (size_t)(put_byte(end, index % 256) - out);
}

int64_t pb_scsi_address(int64_t index, char *out, size_t room) {
    if (index < 0 || index > PB_SCSI_INDEX_MAX) return PB_ERANGE;
    char text[PB_SCSI_ADDRESS_MAX];
    size_t len = put_address(text, (uint32_t)index);
    if (len > room) return PB_ETOOLONG;
    for (size_t i = 0; i < len; i++) out[i] = text[i];
    return (int64_t)len;
}

int64_t pb_scsi_addresses(int64_t first, int64_t count, char *out, size_t room) {
    if (first < 0 || count < 0) return PB_ERANGE;
    if (count > 0 && (first > PB_SCSI_INDEX_MAX || count - 1 > PB_SCSI_INDEX_MAX - first))
        return PB_ERANGE;
    if ((uint64_t)count > room / (PB_SCSI_ADDRESS_MAX + 1)) return PB_ETOOLONG;
    char *at = out;
    for (int64_t i = 0; i < count; i++) {
        at += put_address(at, (uint32_t)(first + i));
        *at++ = '\n';
    }
    return at - out;
}

/*
 * Reads one part, moving *at to its end: 0 ... 255, or 256 for anything larger.  PB_EINVAL: no
 * digit, or a leading zero.
 */
static int64_t read_part(const char **at, const char *end) {
    const char *start = *at;
    int64_t value = 0;
    for (; *at < end && **at >= '0' && **at <= '9'; ++*at) {
        value = value * 10 + (**at - '0');
        if (value > 256) value = 256;
    }
    if (*at == start || (*start == '0' && *at - start > 1)) return PB_EINVAL;
    return value;
}

int64_t pb_scsi_index(const char *address, size_t address_len) {
    if (address_len == 0) return PB_EINVAL;
    const char *at = address, *end = address + address_len;
    int64_t id = read_part(&at, end);
    if (id < 0 || at == end || *at++ != ':') return PB_EINVAL;
    int64_t lun = read_part(&at, end);
    if (lun < 0 || at != end) return PB_EINVAL;
    if (id > 255 || lun > 255) return PB_ERANGE;
    return id * 256 + lun;
}
