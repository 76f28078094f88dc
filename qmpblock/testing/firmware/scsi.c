/* SCSI disks behind a virtio-scsi controller: virtio 1.2, 5.6.6; SBC-4 for the commands. */
#include "cpu.h"

enum { INQUIRY = 0x12, UNMAP = 0x42, READ_16 = 0x88, WRITE_16 = 0x8a,
       SYNCHRONIZE_CACHE_10 = 0x35, WRITE_SAME_16 = 0x93, SERVICE_ACTION_IN_16 = 0x9e,
       REPORT_LUNS = 0xa0 };
#define READ_CAPACITY_16 0x10
#define TARGETS 256u
#define LUNS 8u                     /* the first ones of each target */
#define CHECK_CONDITION 2
#define UNIT_ATTENTION 6

static void put_be(u8 *to, u64 value, int bytes)
{
    while (bytes--) {
        to[bytes] = value;
        value >>= 8;
    }
}

static u64 get_be(const u8 *from, int bytes)
{
    u64 value = 0;

    while (bytes--)
        value = value << 8 | *from++;
    return value;
}

static u8 *header(struct request *request)
{
    struct scsi_header *header = &request->header.scsi;

    for (u32 i = 0; i < sizeof *header; i++)
        ((u8 *)header)[i] = 0;
    header->lun[0] = 1;             /* a LUN of the form "target, single level" */
    header->lun[1] = request->disk->target;
    put_be(header->lun + 2, 0x4000 | request->disk->lun, 2);
    return header->cdb;
}

u32 scsi_prepare(struct request *request, enum operation operation, u64 lba, u32 sectors)
{
    static const u8 opcodes[] = {
        [READ] = READ_16, [WRITE] = WRITE_16, [FLUSH] = SYNCHRONIZE_CACHE_10,
        [DISCARD] = UNMAP, [ZEROES] = WRITE_SAME_16,
    };
    u8 *cdb = header(request), *data = (u8 *)request_buffer(request);

    cdb[0] = opcodes[operation];
    if (operation == FLUSH)         /* the whole disk; QEMU has the 10-byte command only */
        return 0;
    if (operation == DISCARD) {
        put_be(cdb + 7, 24, 2);
        put_be(data, 22, 2);        /* a header and one range */
        put_be(data + 2, 16, 2);
        put_be(data + 4, 0, 4);
        put_be(data + 8, lba, 8);
        put_be(data + 16, sectors, 4);
        put_be(data + 20, 0, 4);
        return 24;
    }
    put_be(cdb + 2, lba, 8);
    put_be(cdb + 10, sectors, 4);
    if (operation == ZEROES) {      /* one sector of zeros, repeated */
        set_words((u32 *)data, 0, SECTOR / 4);
        return SECTOR;
    }
    return sectors * SECTOR;
}

static u8 sense_key(struct request *request)
{
    const u8 *sense = request->answer.scsi.sense;

    return ((sense[0] & 0x7f) >= 0x72 ? sense[1] : sense[2]) & 15;
}

int scsi_unit_attention(struct request *request)
{
    struct scsi_answer *answer = &request->answer.scsi;

    return !answer->response && answer->status == CHECK_CONDITION &&
           sense_key(request) == UNIT_ATTENTION;
}

/* The transport's response, the SCSI status and the sense key, a byte each. */
u32 scsi_status(struct request *request)
{
    struct scsi_answer *answer = &request->answer.scsi;

    return (u32)answer->response << 16 | answer->status << 8 |
           (answer->status == CHECK_CONDITION ? sense_key(request) : 0);
}

/* A command outside the ordinary ones; its data lands in the request's buffer. */
static int ask(struct request *request, u8 opcode, u8 action, u32 length)
{
    u8 *cdb = header(request);

    cdb[0] = opcode;
    cdb[1] = action;
    if (opcode == INQUIRY)
        put_be(cdb + 3, length, 2);
    else if (opcode == REPORT_LUNS)
        put_be(cdb + 6, length, 4);
    else
        put_be(cdb + 10, length, 4);
    set_words(request_buffer(request), 0, length / 4);
    request_transfer(request, length, 1);
    return !request_wait(request);
}

/* The size in sectors of the disk at (target, lun); 0: no disk that we can drive. */
static u64 disk_size(struct request *request)
{
    const u8 *data = (const u8 *)request_buffer(request);

    if (!ask(request, INQUIRY, 0, 36) || data[0])       /* not a direct-access device */
        return 0;
    if (!ask(request, SERVICE_ACTION_IN_16, READ_CAPACITY_16, 32) || get_be(data + 8, 4) != SECTOR)
        return 0;
    return get_be(data, 8) + 1;
}

static struct disk *known(struct virtio *device, u8 target, u16 lun)
{
    for (u32 i = 0; i < DISKS; i++)
        if (disks[i].device == device && disks[i].target == target && disks[i].lun == lun)
            return &disks[i];
    return disk_add(device, target, lun, 0);
}

/* The disks of a controller: new ones are added, those that are gone forgotten. */
void scsi_scan(struct virtio *device)
{
    struct disk probe = {.device = device};
    struct request *request = request_take(&probe);

    if (!request)
        return;
    for (u32 i = 0; i < DISKS; i++)
        if (disks[i].device == device)
            disks[i].sectors = 0;
    for (u32 target = 0; target < TARGETS; target++) {
        const u8 *list = (const u8 *)request_buffer(request);
        u16 luns[LUNS];
        u32 count;

        probe.target = target;
        probe.lun = 0;
        if (!ask(request, REPORT_LUNS, 0, 8 + LUNS * 8))
            continue;
        count = get_be(list, 4) / 8;
        if (count > LUNS)
            count = LUNS;
        for (u32 i = 0; i < count; i++)
            luns[i] = get_be(list + 8 + i * 8, 2) & 0x3fff;
        for (u32 i = 0; i < count; i++) {
            u64 sectors;
            struct disk *disk;

            probe.lun = luns[i];
            sectors = disk_size(request);
            disk = sectors ? known(device, target, luns[i]) : 0;
            if (disk)
                disk->sectors = sectors;
        }
    }
    for (u32 i = 0; i < DISKS; i++)
        if (disks[i].device == device && !disks[i].sectors)
            disk_forget(&disks[i]);
    request_release(request);
}
