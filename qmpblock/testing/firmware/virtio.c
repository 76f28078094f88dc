/* What the two transports share: the table of devices and the one request queue of each. */
#include "cpu.h"

#define MMIO_TRANSPORTS 32u

struct virtio virtio_devices[DISKS];
static struct queue queues[DISKS] __attribute__((aligned(4096)));

u32 virtio_wanted_features(u8 type)
{
    u32 block = FEATURE_READ_ONLY | FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_ZEROES;

    return FEATURE_INDIRECT | (type == VIRTIO_BLOCK ? block : 0);
}

u16 virtio_request_queue(u8 type)
{
    return type == VIRTIO_SCSI ? 2 : 0;     /* SCSI: after the control and the event queue */
}

/* A free entry of the table, ready for a transport to attach; null when the device is known
   already or there is no room. */
static struct virtio *new_device(u8 transport, u16 where, u8 type)
{
    struct virtio *device = 0;

    for (u32 i = DISKS; i--;) {
        struct virtio *other = &virtio_devices[i];

        if (other->transport == transport && other->where == where)
            return 0;
        if (other->transport == TRANSPORT_NONE)
            device = other;
    }
    if (!device)
        return 0;
    device->where = where;
    device->type = type;
    device->used_seen = 0;
    device->queue = &queues[device - virtio_devices];
    set_words((u32 *)device->queue, 0, sizeof *device->queue / 4);
    return device;
}

static void attached(struct virtio *device, u8 transport)
{
    device->transport = transport;
    if (device->type == VIRTIO_BLOCK)
        disk_add(device, 0, 0, 0);
}

static u8 pci_type(u32 id)
{
    switch (id) {
    case 0x10011af4u: case 0x10421af4u: return VIRTIO_BLOCK;
    case 0x10041af4u: case 0x10481af4u: return VIRTIO_SCSI;
    }
    return 0;
}

static void found_on_pci(u16 function, u32 id)
{
    u8 type = pci_type(id);
    struct virtio *device = type ? new_device(TRANSPORT_PCI, function, type) : 0;

    if (device && virtio_pci_attach(device, function))
        attached(device, TRANSPORT_PCI);
}

void virtio_scan(void)
{
    if (pci_present()) {
        for (u32 i = 0; i < DISKS; i++) {
            struct virtio *device = &virtio_devices[i];

            if (device->transport == TRANSPORT_PCI && !virtio_pci_attached(device))
                device->transport = TRANSPORT_NONE;
        }
        disks_forget_gone();
        pci_scan(found_on_pci);
    } else {
        disks_forget_gone();
        /* QEMU attaches devices from the last transport down: so in order of its command line */
        for (u16 i = MMIO_TRANSPORTS; i--;) {
            u8 type = virtio_mmio_type(i);
            struct virtio *device = type ? new_device(TRANSPORT_MMIO, i, type) : 0;

            if (device && virtio_mmio_attach(device, i))
                attached(device, TRANSPORT_MMIO);
        }
    }
    for (u32 i = 0; i < DISKS; i++)
        if (virtio_devices[i].transport && virtio_devices[i].type == VIRTIO_SCSI)
            scsi_scan(&virtio_devices[i]);
}

void virtio_submit(struct virtio *device, u32 slot, struct descriptor *chain, u32 entries)
{
    struct queue *queue = device->queue;
    struct descriptor *entry = &queue->table[slot];
    u16 index = queue->available_index;

    entry->address = (u32)chain;
    entry->length = entries * sizeof *chain;
    entry->flags = DESCRIPTOR_INDIRECT;
    queue->available[index % REQUESTS] = slot;
    memory_barrier();
    queue->available_index = index + 1;
    memory_barrier();
    if (queue->used_flags & 1)          /* the device polls and wants no notification */
        return;
    if (device->transport == TRANSPORT_PCI)
        *device->doorbell = virtio_request_queue(device->type);
    else
        write32(device->registers + 0x50, virtio_request_queue(device->type));
}

int virtio_reap(struct virtio *device)
{
    struct queue *queue = device->queue;

    if (queue->used_index == device->used_seen)
        return -1;
    memory_barrier();
    return queue->used[device->used_seen++ % REQUESTS].id % REQUESTS;
}

int virtio_pending(void)
{
    for (u32 i = 0; i < DISKS; i++) {
        struct virtio *device = &virtio_devices[i];

        if (device->transport && device->queue->used_index != device->used_seen)
            return 1;
    }
    return 0;
}

void virtio_interrupt(void)
{
    for (u32 i = 0; i < DISKS; i++) {
        struct virtio *device = &virtio_devices[i];

        if (device->transport == TRANSPORT_PCI)
            (void)*device->interrupt;   /* reading it acknowledges */
        else if (device->transport == TRANSPORT_MMIO)
            write32(device->registers + 0x64, read32(device->registers + 0x60));
    }
}
