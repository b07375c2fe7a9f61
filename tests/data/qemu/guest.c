/* A bare-metal guest that checks itself: it writes pages and disk sectors at random, remembers in
 * memory what it wrote, and looks before each write whether it is still there. Every PERIOD writes it
 * prints "MEM n=<writes> bad=<mismatches>" on its serial port. Booted by QEMU's -kernel (multiboot);
 * the disk is the first one on the first IDE channel, driven by port I/O. */

typedef unsigned int u32;
typedef unsigned char u8;

#define PAGES 1024
#define PERIOD 2000
#define SECTORS 256
#define FIRST_SECTOR 256
/* A sector is written every so many pages. */
#define DISK_EVERY 100

/* Magic, flags, checksum of a multiboot kernel. */
__attribute__((section(".multiboot"), used)) static const u32 header[3] = {
    0x1BADB002, 0, -(0x1BADB002)};

static inline void out(u32 port, u8 value) {
    __asm__ volatile("outb %0,%w1" ::"a"(value), "d"(port));
}

static inline u8 in(u32 port) {
    u8 value;
    __asm__ volatile("inb %w1,%0" : "=a"(value) : "d"(port));
    return value;
}

static void print(const char *text) {
    while (*text) {
        while (!(in(0x3fd) & 0x20)) {
        }
        out(0x3f8, *text++);
    }
}

static void print_number(u32 number) {
    char digits[12];
    int at = 11;
    digits[at] = 0;
    do {
        digits[--at] = '0' + number % 10;
        number /= 10;
    } while (number);
    print(digits + at);
}

/* The pages under test, at 16 MiB. */
#define WORDS ((volatile u32 *)0x1000000)
static volatile u32 written[PAGES];

static volatile u32 stored[SECTORS];
static u32 sector[128];

static void disk_ready(u8 mask, u8 wanted) {
    while ((in(0x1f7) & mask) != wanted) {
    }
}

/* Begins to read (0x20) or write (0x30) one sector, and waits until its data can be moved. */
static void disk_command(u32 number, u8 command) {
    disk_ready(0x80, 0);
    out(0x1f6, 0xe0 | ((number >> 24) & 15));
    out(0x1f2, 1);
    out(0x1f3, number);
    out(0x1f4, number >> 8);
    out(0x1f5, number >> 16);
    out(0x1f7, command);
    disk_ready(0x88, 0x08);
}

/* One step on the disk; returns the number of mismatches. */
static u32 disk_step(u32 slot, u32 value) {
    u32 bad = 0, count = 256;
    void *at = sector;
    if (stored[slot]) {
        disk_command(FIRST_SECTOR + slot, 0x20);
        __asm__ volatile("cld; rep insw" : "+D"(at), "+c"(count) : "d"(0x1f0) : "memory");
        bad = sector[0] != stored[slot] || sector[127] != ~stored[slot];
    }
    for (u32 i = 0; i < 127; i++) {
        sector[i] = value;
    }
    sector[127] = ~value;
    disk_command(FIRST_SECTOR + slot, 0x30);
    at = sector;
    count = 256;
    __asm__ volatile("cld; rep outsw" : "+S"(at), "+c"(count) : "d"(0x1f0) : "memory");
    disk_ready(0x80, 0);
    stored[slot] = value;
    return bad;
}

void work(void) {
    u32 random = 2463534242u, writes = 0, bad = 0;
    for (u32 i = 0; i < PAGES; i++) {
        written[i] = 0;
        WORDS[i * 1024] = 0;
        WORDS[i * 1024 + 1023] = ~0u;
    }
    out(0x3f6, 2); /* No interrupts of the disk. */
    print("READY\n");
    for (;;) {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        u32 page = random % PAGES;
        if (WORDS[page * 1024] != written[page] || WORDS[page * 1024 + 1023] != ~written[page]) {
            bad++;
        }
        writes++;
        WORDS[page * 1024] = writes;
        WORDS[page * 1024 + 1023] = ~writes;
        written[page] = writes;
        if (writes % DISK_EVERY == 0) {
            bad += disk_step(random / PAGES % SECTORS, writes);
        }
        if (writes % PERIOD == 0) {
            print("MEM n=");
            print_number(writes);
            print(" bad=");
            print_number(bad);
            print("\n");
        }
    }
}

__asm__(".section .text\n.globl _start\n_start: cli; mov $0x90000,%esp; call work\n");
