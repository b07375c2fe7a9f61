/* A bare-metal guest that checks itself: it writes pages and sectors of two disks at random, remembers
 * in memory what it wrote, and looks before each write whether it is still there. Every PERIOD writes it
 * prints "MEM n=<writes> bad=<mismatches>" on its serial port. Booted by QEMU's -kernel (multiboot);
 * the disks are the first ones of the two IDE channels, driven by port I/O.
 *
 * A number on its command line (-append) makes it write so many pages, one after the other over and
 * over, and leave the disks alone: a dirty set of known size. */

typedef unsigned int u32;
typedef unsigned char u8;

#define PAGES 1024
/* The most that memory has room for: 40 of 64 MiB. */
#define PAGES_MAX 10240
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
static volatile u32 written[PAGES_MAX];

#define DISKS 2
static volatile u32 stored[DISKS][SECTORS];
static u32 sector[128];

/* First port of a disk's channel. */
static const u32 channel[DISKS] = {0x1f0, 0x170};

static void disk_ready(u32 port, u8 mask, u8 wanted) {
    while ((in(port + 7) & mask) != wanted) {
    }
}

/* Begins to read (0x20) or write (0x30) one sector, and waits until its data can be moved. */
static void disk_command(u32 port, u32 number, u8 command) {
    disk_ready(port, 0x80, 0);
    out(port + 6, 0xe0 | ((number >> 24) & 15));
    out(port + 2, 1);
    out(port + 3, number);
    out(port + 4, number >> 8);
    out(port + 5, number >> 16);
    out(port + 7, command);
    disk_ready(port, 0x88, 0x08);
}

/* One step on a disk; returns the number of mismatches. */
static u32 disk_step(u32 disk, u32 slot, u32 value) {
    u32 bad = 0, count = 256, port = channel[disk];
    volatile u32 *known = &stored[disk][slot];
    void *at = sector;
    if (*known) {
        disk_command(port, FIRST_SECTOR + slot, 0x20);
        __asm__ volatile("cld; rep insw" : "+D"(at), "+c"(count) : "d"(port) : "memory");
        bad = sector[0] != *known || sector[127] != ~*known;
    }
    for (u32 i = 0; i < 127; i++) {
        sector[i] = value;
    }
    sector[127] = ~value;
    disk_command(port, FIRST_SECTOR + slot, 0x30);
    at = sector;
    count = 256;
    __asm__ volatile("cld; rep outsw" : "+S"(at), "+c"(count) : "d"(port) : "memory");
    disk_ready(port, 0x80, 0);
    *known = value;
    return bad;
}

/* The number at the end of the command line; 0 if there is none. */
static u32 asked_pages(const u32 *boot) {
    u32 number = 0;
    if (boot[0] & 4) {
        for (const char *at = (const char *)boot[4]; *at; at++) {
            number = *at >= '0' && *at <= '9' ? number * 10 + (*at - '0') : 0;
        }
    }
    return number > PAGES_MAX ? PAGES_MAX : number;
}

void work(const u32 *boot) {
    u32 random = 2463534242u, writes = 0, bad = 0;
    u32 asked = asked_pages(boot), pages = asked ? asked : PAGES;
    for (u32 i = 0; i < pages; i++) {
        written[i] = 0;
        WORDS[i * 1024] = 0;
        WORDS[i * 1024 + 1023] = ~0u;
    }
    out(0x3f6, 2); /* No interrupts of the disks. */
    out(0x376, 2);
    print("READY\n");
    for (;;) {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        u32 page = asked ? writes % pages : random % pages;
        if (WORDS[page * 1024] != written[page] || WORDS[page * 1024 + 1023] != ~written[page]) {
            bad++;
        }
        writes++;
        WORDS[page * 1024] = writes;
        WORDS[page * 1024 + 1023] = ~writes;
        written[page] = writes;
        if (!asked && writes % DISK_EVERY == 0) {
            u32 step = writes / DISK_EVERY;
            bad += disk_step(step % DISKS, random / PAGES % SECTORS, writes);
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

/* Multiboot passes its information in ebx. */
__asm__(".section .text\n.globl _start\n_start: cli; mov $0x90000,%esp; push %ebx; call work\n");
