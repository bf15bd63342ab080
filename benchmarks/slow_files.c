/* A file layer with a bandwidth per thread, to be preloaded (LD_PRELOAD): whoever reads or writes regular files below
 * $SLOW_FILES_UNDER sleeps $SLOW_FILES_US_PER_MIB microseconds for every MiB. Sleeping ranks share two cores as ranks on
 * nodes of their own would. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static __thread double owed_us;

static int is_slow(int fd) {
    static const char *under;
    if (!under && !(under = getenv("SLOW_FILES_UNDER"))) return 0;
    struct stat status;
    if (fstat(fd, &status) || !S_ISREG(status.st_mode)) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    return length > 0 && !strncmp(path, under, strlen(under));
}

static ssize_t slowed(int fd, ssize_t bytes) {
    if (bytes > 0 && is_slow(fd)) {
        owed_us += bytes / 1048576.0 * atof(getenv("SLOW_FILES_US_PER_MIB"));
        if (owed_us >= 1000) { /* a sleep costs some 60 us on its own */
            struct timespec rest = {(time_t)(owed_us / 1e6), (long)(owed_us * 1000) % 1000000000};
            nanosleep(&rest, NULL);
            owed_us = 0;
        }
    }
    return bytes;
}

#define LAYER(name, parameters, ...)                                  \
    ssize_t name parameters {                                         \
        static ssize_t(*real) parameters;                             \
        if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name);         \
        return slowed(fd, real(__VA_ARGS__));                         \
    }
LAYER(read, (int fd, void *data, size_t size), fd, data, size)
LAYER(write, (int fd, const void *data, size_t size), fd, data, size)
LAYER(readv, (int fd, const struct iovec *parts, int count), fd, parts, count)
LAYER(writev, (int fd, const struct iovec *parts, int count), fd, parts, count)
LAYER(pread64, (int fd, void *data, size_t size, off_t at), fd, data, size, at)
LAYER(pwrite64, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
LAYER(preadv64, (int fd, const struct iovec *parts, int count, off_t at), fd, parts, count, at)
LAYER(pwritev64, (int fd, const struct iovec *parts, int count, off_t at), fd, parts, count, at)
LAYER(preadv64v2, (int fd, const struct iovec *parts, int count, off_t at, int flags), fd, parts, count, at, flags)
LAYER(pwritev64v2, (int fd, const struct iovec *parts, int count, off_t at, int flags), fd, parts, count, at, flags)
