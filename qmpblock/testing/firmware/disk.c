/* The table of disks, and requests from a common pool: taken, submitted, completed, released. */
#include "cpu.h"

#define NOTHING 0xffu               /* answer.block before the device answered */
#define WORKING_EVERY 4096u         /* requests of commands: a sign of life for the host */
#define STATUS_GONE 0x1000000u         /* the disk was unplugged with the request in flight */

struct disk disks[DISKS];
static struct request requests[REQUESTS];
static u8 idle_slots[REQUESTS];
static u32 idle_count;

static u32 slot_of(struct request *request)
{
    return request - requests;
}

u32 *request_buffer(struct request *request)
{
    return (u32 *)(REQUEST_BUFFERS + slot_of(request) * REQUEST_SECTORS * SECTOR);
}

void disks_init(void)
{
    while (idle_count < REQUESTS) {
        idle_slots[idle_count] = REQUESTS - 1 - idle_count;
        idle_count++;
    }
}

struct disk *disk_add(struct virtio *device, u8 target, u16 lun, u64 sectors)
{
    for (u32 i = 0; i < DISKS; i++) {
        struct disk *disk = &disks[i];

        if (disk->device)
            continue;
        disk->device = device;
        disk->target = target;
        disk->lun = lun;
        disk->sectors = sectors;
        return disk;
    }
    return 0;
}

u64 disk_sectors(struct disk *disk)
{
    if (disk->device->type == VIRTIO_BLOCK)     /* may have been resized since */
        disk->sectors = (u64)read32(disk->device->config + 4) << 32 | read32(disk->device->config);
    return disk->sectors;
}

struct request *request_take(struct disk *disk)
{
    struct request *request;

    if (!idle_count)
        return 0;
    request = &requests[idle_slots[--idle_count]];
    request->disk = disk;
    request->run = 0;
    return request;
}

struct request *request_await(struct disk *disk)
{
    struct request *request;

    while (!(request = request_take(disk)))
        work(0);
    return request;
}

u32 requests_idle(void)
{
    return idle_count;
}

u64 requests_oldest(struct run *run, u64 oldest)
{
    for (u32 i = 0; i < REQUESTS; i++)
        if (requests[i].disk && requests[i].run == run && requests[i].began < oldest)
            oldest = requests[i].began;
    return oldest;
}

void request_release(struct request *request)
{
    request->disk = 0;
    idle_slots[idle_count++] = slot_of(request);
}

static void describe(struct descriptor *at, void *address, u32 length, u16 flags)
{
    at->address = (u32)address;
    at->length = length;
    at->flags = flags;
    at->next = 0;
}

void request_transfer(struct request *request, u32 length, int reading)
{
    struct virtio *device = request->disk->device;
    int scsi = device->type == VIRTIO_SCSI;
    u32 header = scsi ? sizeof request->header.scsi : sizeof request->header.block;
    u32 answer = scsi ? sizeof request->answer.scsi : sizeof request->answer.block;
    void *data = request_buffer(request);
    struct descriptor *end = request->chain;

    request->done = 0;
    request->answer.block = NOTHING;
    request->began = clock_now();
    /* What the device reads comes before what it writes; there, a block device's answer comes
       after the data, a SCSI controller's before. */
    describe(end++, &request->header, header, 0);
    if (length && !reading)
        describe(end++, data, length, 0);
    if (length && reading && !scsi)
        describe(end++, data, length, DESCRIPTOR_WRITE);
    describe(end++, &request->answer, answer, DESCRIPTOR_WRITE);
    if (length && reading && scsi)
        describe(end++, data, length, DESCRIPTOR_WRITE);
    request->entries = end - request->chain;
    for (u32 i = 0; i + 1 < request->entries; i++) {
        request->chain[i].flags |= DESCRIPTOR_NEXT;
        request->chain[i].next = i + 1;
    }
    virtio_submit(device, slot_of(request), request->chain, request->entries);
}

void request_submit(struct request *request, enum operation operation, u64 lba, u32 sectors)
{
    u32 length = request->disk->device->type == VIRTIO_SCSI
                     ? scsi_prepare(request, operation, lba, sectors)
                     : block_prepare(request, operation, lba, sectors);

    request->operation = operation;
    request_transfer(request, length, operation == READ);
}

static void complete(struct request *request, u32 status)
{
    request->status = status;
    request->done = 1;
    if (request->run)
        stress_complete(request);
}

static void completed(struct virtio *device, struct request *request)
{
    if (!request->disk || request->done)
        return;
    if (device->type != VIRTIO_SCSI) {
        complete(request, request->answer.block);
    } else if (scsi_unit_attention(request)) {
        /* news (a reset, another size), not a failure: the command was not done, so again */
        virtio_submit(device, slot_of(request), request->chain, request->entries);
    } else {
        complete(request, scsi_status(request));
    }
}

int disks_poll(void)
{
    int found = 0, slot;

    for (u32 i = 0; i < DISKS; i++) {
        struct virtio *device = &virtio_devices[i];

        while (device->transport && (slot = virtio_reap(device)) >= 0) {
            completed(device, &requests[slot]);
            found = 1;
        }
    }
    return found;
}

u32 request_wait(struct request *request)
{
    static u32 waits;

    while (!request->done)
        work(0);
    if (++waits % WORKING_EVERY == 0)
        put("*WORKING\n");
    return request->status;
}

/* A disk that was unplugged: its run ends, its number becomes free. */
void disk_forget(struct disk *disk)
{
    if (disk->run)
        stress_abandon(disk, STATUS_GONE);
    disk->device = 0;
}

/* Forgets the disks whose device is gone; what they had in flight fails. */
void disks_forget_gone(void)
{
    for (u32 i = 0; i < REQUESTS; i++) {
        struct request *request = &requests[i];
        struct virtio *device = request->disk ? request->disk->device : 0;

        if (device && !device->transport && !request->done)
            complete(request, STATUS_GONE);
    }
    for (u32 i = 0; i < DISKS; i++)
        if (disks[i].device && !disks[i].device->transport)
            disk_forget(&disks[i]);
}
