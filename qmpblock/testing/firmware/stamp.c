/* What a stamped sector holds, and the checksum of reads.  stamps.py on the host knows both. */
#include "guest.h"

#define STAMP_MAGIC 0x32534754u     /* "TGS2" */
#define FILLER_STEP 0x9e3779b1u
#define FIRST_FILLER 5
#define LAST_FILLER 125

u32 mix(u32 x)
{
    x *= 0x9e3779b1u;
    x ^= x >> 15;
    x *= 0x85ebca77u;
    x ^= x >> 13;
    return x;
}

static u32 filler(u64 lba, u32 sequence, u32 seed)
{
    return mix((u32)lba ^ mix((u32)(lba >> 32) ^ mix(sequence ^ mix(seed))));
}

void stamp(u32 *sector, u64 lba, u32 sequence, u32 seed)
{
    u32 value = filler(lba, sequence, seed);

    sector[0] = STAMP_MAGIC;
    sector[1] = seed;
    sector[2] = lba;
    sector[3] = lba >> 32;
    sector[4] = sequence;
    for (u32 i = FIRST_FILLER; i <= LAST_FILLER; i++, value += FILLER_STEP)
        sector[i] = value;
    sector[126] = sequence;
    sector[127] = ~sequence;
}

int stamp_matches(const u32 *sector, u64 lba, u32 sequence, u32 seed)
{
    u32 value = filler(lba, sequence, seed), wrong;

    wrong = (sector[0] ^ STAMP_MAGIC) | (sector[1] ^ seed) | (sector[2] ^ (u32)lba) |
            (sector[3] ^ (u32)(lba >> 32)) | (sector[4] ^ sequence) | (sector[126] ^ sequence) |
            (sector[127] ^ ~sequence);
    for (u32 i = FIRST_FILLER; i <= LAST_FILLER; i++, value += FILLER_STEP)
        wrong |= sector[i] ^ value;
    return !wrong;
}

static u32 crc32_table[256];

void crc32_init(void)
{
    for (u32 i = 0; i < 256; i++) {
        u32 value = i;

        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
        crc32_table[i] = value;
    }
}

/* zlib's: begins with 0, and each part continues with the result of the one before. */
u32 crc32(u32 crc, const u8 *data, u32 length)
{
    crc = ~crc;
    while (length--)
        crc = crc >> 8 ^ crc32_table[(crc ^ *data++) & 255];
    return ~crc;
}
