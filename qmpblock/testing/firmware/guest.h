/* The tiny guest: a bare-metal program that is the machine's firmware and drives its disks.
 *
 * One CPU, 32-bit protected mode, flat addresses, paging off.  Interrupts only wake the CPU and
 * note that something happened; everything else runs in the main loop, so nothing needs a lock.
 *
 *   0x00100000  the program, copied from the ROM, and its .bss
 *   0x00200000  request buffers, REQUESTS x 64 KiB
 *   0x00800000  stress tables: the last acknowledged sequence number of each block
 *   0x01000000  RAM that the `dirty` command writes to (with more than 16 MiB)
 */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SECTOR 512u
#define REQUESTS 64u                /* in flight on all disks together; also each queue's size */
#define REQUEST_BUFFERS 0x00200000u
#define REQUEST_SECTORS 128u        /* 64 KiB, the size of one request's buffer */
#define STRESS_TABLES ((u32 *)0x00800000u)
#define STRESS_TABLES_ENTRIES 0x00200000u
#define DIRTY_RAM 0x01000000u
#define DISKS 16u

/* ---- cpu.c: interrupts; clock.c: time -------------------------------------------------- */
void interrupts_init(void);
void interrupt(u32 vector);         /* from interrupts.S, with interrupts off */
extern volatile u32 ticks;          /* 100 a second while a rate-limited run needs them */
void ticks_enable(int on);
u64 clock_now(void);                /* time stamp counter */
void clock_calibrate(void);         /* the first call takes 12 ms */
u64 clock_microseconds(u64 counts);

/* ---- console.c: the serial line -------------------------------------------------------- */
void console_init(void);
void console_receive(void);         /* from the interrupt */
int console_pending(void);
char console_take(void);
void put_char(char c);
void put(const char *text);
void put_number(u64 value);
void put_hex(u32 value, int digits);
void put_field(const char *name, u64 value);    /* " name=value" */

/* ---- pci.c ----------------------------------------------------------------------------- */
/* A PCI function is named by bus << 8 | device << 3 | function. */
int pci_present(void);
u32 pci_read(u16 function, u8 offset);
void pci_write(u16 function, u8 offset, u32 value);
u8 pci_capability(u16 function, u8 id, u8 after);   /* offset; 0: none */
u32 pci_place_bar(u16 function, u8 bar);            /* memory address; 0: cannot */
void pci_scan(void (*found)(u16 function, u32 id));
u32 pci_eject(void);                /* grants every pending unplug; how many */
void power_off(void);
void power_reset(void);
void power_init(void);
void power_interrupt(void);
int power_button(void);             /* was it pressed? */

/* ---- virtio.c, virtio_pci.c, virtio_mmio.c --------------------------------------------- */
struct descriptor { u64 address; u32 length; u16 flags, next; };
#define DESCRIPTOR_NEXT 1
#define DESCRIPTOR_WRITE 2          /* the device writes to it */
#define DESCRIPTOR_INDIRECT 4

/* The legacy layout (used ring on its own page) suits both kinds of transport. */
struct queue {
    struct descriptor table[REQUESTS];
    volatile u16 available_flags, available_index, available[REQUESTS];
    volatile u16 used_flags __attribute__((aligned(4096))), used_index;
    volatile struct { u32 id, length; } used[REQUESTS];
};

enum { VIRTIO_BLOCK = 2, VIRTIO_SCSI = 8 };
enum { TRANSPORT_NONE, TRANSPORT_PCI, TRANSPORT_MMIO };

struct virtio {
    u8 transport, type;
    u16 where;                      /* the PCI function, or the index of the MMIO transport */
    u32 features;                   /* bits 0 to 31 of what was negotiated */
    volatile u8 *registers;         /* PCI: common configuration; MMIO: the transport */
    volatile u8 *config;            /* the device's own configuration */
    volatile u8 *interrupt;         /* PCI: the ISR byte */
    volatile u16 *doorbell;         /* PCI: notification of the one queue we use */
    u16 used_seen;
    struct queue *queue;
};

#define FEATURE_READ_ONLY (1u << 5)
#define FEATURE_FLUSH (1u << 9)
#define FEATURE_DISCARD (1u << 13)
#define FEATURE_ZEROES (1u << 14)
#define FEATURE_INDIRECT (1u << 28)

void virtio_scan(void);             /* finds new devices, forgets those that are gone */
extern struct virtio virtio_devices[DISKS];
u32 virtio_wanted_features(u8 type);
u16 virtio_request_queue(u8 type);
int virtio_pci_attach(struct virtio *device, u16 function);
int virtio_pci_attached(struct virtio *device);     /* still? */
int virtio_mmio_attach(struct virtio *device, u16 index);
u8 virtio_mmio_type(u16 index);     /* 0: nothing attached */
void virtio_submit(struct virtio *device, u32 slot, struct descriptor *chain, u32 entries);
int virtio_reap(struct virtio *device);             /* a completed slot, or -1 */
int virtio_pending(void);           /* does any device have a completion to reap? */
void virtio_interrupt(void);        /* lowers the interrupt of every device */

#define read8(p) (*(volatile u8 *)(p))
#define read16(p) (*(volatile u16 *)(p))
#define read32(p) (*(volatile u32 *)(p))
#define write8(p, v) (*(volatile u8 *)(p) = (v))
#define write16(p, v) (*(volatile u16 *)(p) = (v))
#define write32(p, v) (*(volatile u32 *)(p) = (v))

/* ---- disk.c, block.c, scsi.c ----------------------------------------------------------- */
enum operation { READ, WRITE, FLUSH, DISCARD, ZEROES };

struct run;
struct disk {
    struct virtio *device;          /* null: no disk has this number (now) */
    u8 target;                      /* SCSI */
    u16 lun;
    u64 sectors;
    struct run *run;
};

struct block_header { u32 type, reserved; u64 lba; };
struct scsi_header { u8 lun[8]; u64 tag; u8 attribute, priority, crn, cdb[32]; }
    __attribute__((packed));
struct scsi_answer { u32 sense_length, residual; u16 qualifier; u8 status, response, sense[96]; };

struct request {
    struct descriptor chain[3];
    union { struct block_header block; struct scsi_header scsi; } header;
    union { u8 block; struct scsi_answer scsi; } answer;
    struct disk *disk;
    struct run *run;                /* null: a command waits for it */
    u8 operation, done, entries;    /* of the chain */
    u32 status;                     /* 0: success */
    u32 block, sequence;            /* of a run */
    u64 began;
} __attribute__((aligned(16)));

extern struct disk disks[DISKS];
void disks_init(void);
void disk_forget(struct disk *disk);
void disks_forget_gone(void);
int disks_poll(void);               /* completes what the devices finished; 0: nothing */
struct disk *disk_add(struct virtio *device, u8 target, u16 lun, u64 sectors);
u64 disk_sectors(struct disk *disk);
struct request *request_take(struct disk *disk);    /* null: all are in flight */
struct request *request_await(struct disk *disk);   /* waits for one */
void request_release(struct request *request);
u32 requests_idle(void);
u64 requests_oldest(struct run *run, u64 oldest);   /* when the run's oldest one in flight began */
u32 *request_buffer(struct request *request);
void request_submit(struct request *request, enum operation operation, u64 lba, u32 sectors);
void request_transfer(struct request *request, u32 length, int reading);
u32 request_wait(struct request *request);          /* its status */

/* Each makes the header and, for DISCARD and ZEROES, the data; returns the length of the data. */
u32 block_prepare(struct request *request, enum operation operation, u64 lba, u32 sectors);
u32 scsi_prepare(struct request *request, enum operation operation, u64 lba, u32 sectors);
u32 scsi_status(struct request *request);
int scsi_unit_attention(struct request *request);
void scsi_scan(struct virtio *device);

/* ---- stamp.c --------------------------------------------------------------------------- */
u32 mix(u32 x);
void stamp(u32 *sector, u64 lba, u32 sequence, u32 seed);
int stamp_matches(const u32 *sector, u64 lba, u32 sequence, u32 seed);
u32 crc32(u32 crc, const u8 *data, u32 length);
void crc32_init(void);

/* ---- stress.c -------------------------------------------------------------------------- */
struct stress_area { u64 lba; u32 blocks, block_sectors; };
struct stress_load { u32 depth, total, seed, flush_every, rate, read_percent, group; };

const char *stress_start(struct disk *disk, struct stress_area area, struct stress_load load);
int stress_running(struct disk *disk);
int stress_step(void);              /* advances every run; 0: nothing to do now */
void stress_complete(struct request *request);
void stress_stop(struct disk *disk);
void stress_progress(struct disk *disk);            /* fields of the reply */
void stress_latency(struct disk *disk);             /* the same; begins to measure anew */
void stress_abandon(struct disk *disk, u32 status); /* the disk is gone */
/* The status of a failed read, which was at `lba`. */
u32 stress_check(struct disk *disk, u32 *checked, u32 *bad, u64 *lba);

/* ---- commands.c, main.c ---------------------------------------------------------------- */
void command_run(char *line);
void hello(void);
void work(int listening);           /* one turn of the main loop; may sleep */

#endif
