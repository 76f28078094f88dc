/* virtio-blk requests: virtio 1.2, 5.2.6. */
#include "guest.h"

struct segment { u64 lba; u32 sectors, flags; };    /* of a discard or a write zeroes */

u32 block_prepare(struct request *request, enum operation operation, u64 lba, u32 sectors)
{
    static const u8 types[] = {
        [READ] = 0, [WRITE] = 1, [FLUSH] = 4, [DISCARD] = 11, [ZEROES] = 13,
    };
    struct segment *segment = (struct segment *)request_buffer(request);
    int ranged = operation == DISCARD || operation == ZEROES;

    request->header.block.type = types[operation];
    request->header.block.reserved = 0;
    request->header.block.lba = ranged || operation == FLUSH ? 0 : lba;
    if (!ranged)
        return sectors * SECTOR;
    segment->lba = lba;
    segment->sectors = sectors;
    segment->flags = 0;
    return sizeof *segment;
}
