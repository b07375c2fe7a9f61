/*
 * A database that knows what it has promised. Runs as the only program of a Linux guest.
 *
 *   memory   blocks[], written round about by a counter; each is compared before it is written anew
 *            hashes[], one per committed row: what the database must hold
 *   disk     SQLite, WAL, synchronous=FULL, on a file system of its own
 *
 *   says     COMMITTED n          after the commit of row n has returned, and not before
 *            COUNTER c bad=b      now and then: steps of the counter, blocks that were not as left
 *            CHECK ok rows=n      what a "check" on its console finds: with the caches dropped,
 *            CHECK wrong ...      integrity_check, and each row compared with hashes[]
 *            TROUBLE ...          it cannot go on
 *
 * Its console is its standard input and output.
 */
#include <fcntl.h>
#include <poll.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCKS 512
#define WORDS 512
#define STEPS_PER_ROW 16
/* Between two rows, so that the disk lasts for minutes. */
#define REST_MS 5
#define ROWS_MAX (1 << 20)
#define PAYLOAD_MAX 1500

static uint64_t blocks[BLOCKS][WORDS];
static uint64_t counter, bad;
static uint64_t *hashes;
static int64_t rows;
static sqlite3 *db;

/* SplitMix64. */
static uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static void trouble(const char *what)
{
    say("TROUBLE %s: %s", what, db ? sqlite3_errmsg(db) : "no database");
    for (;;)
        pause();
}

static void run(const char *sql)
{
    if (sqlite3_exec(db, sql, NULL, NULL, NULL) != SQLITE_OK)
        trouble(sql);
}

/* Block i holds what step `last` wrote; before that nothing. */
static void step(void)
{
    uint64_t *block = blocks[counter % BLOCKS];
    uint64_t last = counter < BLOCKS ? 0 : mix(counter - BLOCKS);
    int same = 1;
    for (int i = 0; i < WORDS; i++)
        same &= block[i] == (last ? last + i : 0);
    bad += !same;
    uint64_t next = mix(counter);
    for (int i = 0; i < WORDS; i++)
        block[i] = next + i;
    counter++;
}

static uint64_t hash(const unsigned char *bytes, int count)
{
    uint64_t value = 0xcbf29ce484222325;
    for (int i = 0; i < count; i++)
        value = (value ^ bytes[i]) * 0x100000001b3;
    return value;
}

static void commit(sqlite3_stmt *insert)
{
    static unsigned char payload[PAYLOAD_MAX];
    int64_t n = rows + 1;
    uint64_t random = mix(n ^ counter << 32);
    int size = 100 + random % (PAYLOAD_MAX - 100);
    for (int i = 0; i < size; i++)
        payload[i] = mix(random + i / 8) >> 8 * (i % 8);
    sqlite3_bind_int64(insert, 1, n);
    sqlite3_bind_blob(insert, 2, payload, size, SQLITE_STATIC);
    run("BEGIN IMMEDIATE");
    if (sqlite3_step(insert) != SQLITE_DONE)
        trouble("insert");
    sqlite3_reset(insert);
    run("COMMIT");
    if (rows == ROWS_MAX)
        trouble("too many rows");
    hashes[rows++] = hash(payload, size);
    say("COMMITTED %lld", (long long)n);
}

static int is_ok(void *ok, int columns, char **values, char **names)
{
    (void)names;
    *(int *)ok = columns == 1 && values[0] && !strcmp(values[0], "ok");
    return 0;
}

static void check(void)
{
    int ok = 0;
    /* What is read now comes from the disk, and not from what memory knows of it. */
    sync();
    int caches = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (caches < 0 || write(caches, "3", 1) != 1)
        trouble("drop_caches");
    close(caches);
    sqlite3_db_release_memory(db);
    if (sqlite3_exec(db, "PRAGMA integrity_check", is_ok, &ok, NULL) != SQLITE_OK || !ok) {
        say("CHECK wrong integrity: %s", sqlite3_errmsg(db));
        return;
    }
    sqlite3_stmt *select;
    if (sqlite3_prepare_v2(db, "SELECT n, payload FROM t ORDER BY n", -1, &select, NULL)) {
        say("CHECK wrong select: %s", sqlite3_errmsg(db));
        return;
    }
    int64_t found = 0, differ = 0;
    int result;
    while ((result = sqlite3_step(select)) == SQLITE_ROW) {
        int64_t n = sqlite3_column_int64(select, 0);
        const unsigned char *payload = sqlite3_column_blob(select, 1);
        int size = sqlite3_column_bytes(select, 1);
        found++;
        differ += n != found || n > rows || hash(payload, size) != hashes[n - 1];
    }
    sqlite3_finalize(select);
    if (result != SQLITE_DONE || differ || found != rows)
        say("CHECK wrong rows: %lld found, %lld promised, %lld differ: %s", (long long)found,
            (long long)rows, (long long)differ, sqlite3_errmsg(db));
    else
        say("CHECK ok rows=%lld", (long long)rows);
}

int main(int count, char **arguments)
{
    if (count != 2)
        trouble("usage: workload DATABASE");
    hashes = calloc(ROWS_MAX, sizeof *hashes);
    if (!hashes || sqlite3_open(arguments[1], &db))
        trouble("open");
    run("PRAGMA journal_mode=WAL");
    run("PRAGMA synchronous=FULL");
    run("PRAGMA wal_autocheckpoint=64");
    run("PRAGMA mmap_size=0");
    run("CREATE TABLE t (n INTEGER PRIMARY KEY, payload BLOB NOT NULL)");
    sqlite3_stmt *insert;
    if (sqlite3_prepare_v2(db, "INSERT INTO t VALUES (?, ?)", -1, &insert, NULL))
        trouble("prepare");
    for (;;) {
        for (int i = 0; i < STEPS_PER_ROW; i++)
            step();
        commit(insert);
        if (rows % 8 == 0)
            say("COUNTER %llu bad=%llu", (unsigned long long)counter, (unsigned long long)bad);
        struct pollfd console = { .fd = 0, .events = POLLIN };
        char line[64];
        if (poll(&console, 1, REST_MS) == 1 && fgets(line, sizeof line, stdin) &&
            !strncmp(line, "check", 5))
            check();
    }
}
