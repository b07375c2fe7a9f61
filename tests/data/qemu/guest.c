/* A bare-metal guest that checks itself: it writes pages at random, remembers what it wrote, and
 * looks before each write whether the page still holds it. Every PERIOD writes it prints
 * "MEM n=<writes> bad=<mismatches>" on its serial port. Booted by QEMU's -kernel (multiboot). */

typedef unsigned int u32;
typedef unsigned char u8;

#define PAGES 1024
#define PERIOD 2000

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

void work(void) {
    u32 random = 2463534242u, writes = 0, bad = 0;
    for (u32 i = 0; i < PAGES; i++) {
        written[i] = 0;
        WORDS[i * 1024] = 0;
        WORDS[i * 1024 + 1023] = ~0u;
    }
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
