// Stands between a process and the C library's calls that change files: counts those on paths under given folders, and at a
// chosen one kills the process or lets the call fail. Loaded by LD_PRELOAD; does nothing until `faults_arm` is called.
//
// What reaches the kernel past the C library isn't seen: the rename of safetensors' writer is such a call. The calls before and
// after it are points, so the states on the disk before and after it are met; that it fails isn't.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

namespace {

enum Action { COUNT, KILL_BEFORE, KILL_AFTER, KILL_SHORT, FAIL, SHORT };
const char* const CALLS[] = {"open", "write", "flush", "truncate", "rename", "unlink", "rmdir", "mkdir",
                             "lock", "chmod", "read-open", "read"};
enum Call { OPEN, WRITE, FLUSH, TRUNCATE, RENAME, UNLINK, RMDIR, MKDIR, LOCK, CHMOD, READ_OPEN, READ, CALL_KINDS };

struct Fault {
    char root[4][PATH_MAX];
    int roots = 0;
    unsigned calls = 0;  // a bit for each kind of call that counts
    Action action = COUNT;
    int error = 0;
    long first = 0, last = 0;    // numbers of the calls that are met, from 1
    uint64_t seed = 0, one_in = 0;  // instead: one call in so many, drawn by number
    bool folders_only = false;   // of flushes
    int record = -1;
    std::atomic<long> seen{0}, met{0};
} fault;
std::atomic<bool> armed{false};

uint64_t mixed(uint64_t x) {  // splitmix64's finaliser
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

bool path_of(int descriptor, char* path) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0 || path[0] != '/') return false;  // a socket or a pipe
    path[length] = 0;
    return true;
}

bool path_at(int folder, const char* name, char* path) {
    if (!name) return false;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return true;
    }
    char base[PATH_MAX];
    if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(folder, base)) return false;
    return snprintf(path, PATH_MAX, "%s/%s", base, name) < PATH_MAX;
}

bool under_root(const char* path) {
    for (int i = 0; i < fault.roots; i++) {
        size_t length = strlen(fault.root[i]);
        if (!strncmp(path, fault.root[i], length) && (path[length] == '/' || !path[length])) return true;
    }
    return false;
}

void die() {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

// What is to become of a call: COUNT lets it pass.
Action meet(Call call, const char* path) {
    if (!(fault.calls >> call & 1) || !under_root(path)) return COUNT;
    struct stat status;
    if (call == FLUSH && fault.folders_only && (stat(path, &status) || !S_ISDIR(status.st_mode))) return COUNT;
    long number = ++fault.seen;
    if (fault.record >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, CALLS[call], path);
        syscall(SYS_write, fault.record, line, length);
    }
    bool here = fault.one_in ? mixed(fault.seed + number) % fault.one_in == 0 : number >= fault.first && number <= fault.last;
    if (fault.action == COUNT || !here) return COUNT;
    fault.met++;
    if (fault.action == KILL_BEFORE || (fault.action == KILL_SHORT && call != WRITE)) die();
    return fault.action;
}

template <typename Result>
Result ended(Action action, Result result) {
    if (action == KILL_AFTER) die();
    return result;
}

template <typename Function>
Function* next(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

bool writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

}  // namespace

#define BY_DESCRIPTOR(call, descriptor)                                                      \
    char path[PATH_MAX];                                                                     \
    Action action = armed && path_of(descriptor, path) ? meet(call, path) : COUNT;           \
    if (action == FAIL) return errno = fault.error, -1;
#define BY_NAME(call, folder, name)                                                          \
    char path[PATH_MAX];                                                                     \
    Action action = armed && path_at(folder, name, path) ? meet(call, path) : COUNT;         \
    if (action == FAIL) return errno = fault.error, -1;

extern "C" {

// Begin to count, and to inject. `roots` lie one a line; `calls` is a mask by the order of CALLS; `record` a file for a line a
// call, or "". With `one_in` the calls that are met are drawn from `seed`, else they are those from `first` to `last`.
void faults_arm(const char* roots, unsigned calls, int action, int error, long first, long last, uint64_t seed, uint64_t one_in,
                int folders_only, const char* record) {
    for (const char* at = roots; *at && fault.roots < 4; fault.roots++) {
        size_t length = strcspn(at, "\n");
        snprintf(fault.root[fault.roots], PATH_MAX, "%.*s", int(length), at);
        at += length + (at[length] == '\n');
    }
    fault.calls = calls, fault.action = Action(action), fault.error = error, fault.first = first, fault.last = last;
    fault.seed = seed, fault.one_in = one_in, fault.folders_only = folders_only;
    if (*record) fault.record = syscall(SYS_openat, AT_FDCWD, record, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = true;
}

long faults_met() { return fault.met; }

#define OPENS(name)                                                                          \
    int name(const char* file, int flags, ...) {                                             \
        va_list rest;                                                                        \
        va_start(rest, flags);                                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;              \
        va_end(rest);                                                                        \
        static auto real = next<int(const char*, int, ...)>(#name);                          \
        BY_NAME(writes(flags) ? OPEN : READ_OPEN, AT_FDCWD, file)                            \
        return ended(action, real(file, flags, mode));                                       \
    }
#define OPENS_AT(name)                                                                       \
    int name(int folder, const char* file, int flags, ...) {                                 \
        va_list rest;                                                                        \
        va_start(rest, flags);                                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;              \
        va_end(rest);                                                                        \
        static auto real = next<int(int, const char*, int, ...)>(#name);                     \
        BY_NAME(writes(flags) ? OPEN : READ_OPEN, folder, file)                              \
        return ended(action, real(folder, file, flags, mode));                               \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t write(int descriptor, const void* bytes, size_t count) {
    static auto real = next<ssize_t(int, const void*, size_t)>("write");
    BY_DESCRIPTOR(WRITE, descriptor)
    if (action == SHORT || action == KILL_SHORT) count = (count + 1) / 2;
    ssize_t done = real(descriptor, bytes, count);
    if (action == KILL_SHORT) die();
    return ended(action, done);
}

#define WRITES_AT(name, offset_t)                                                            \
    ssize_t name(int descriptor, const void* bytes, size_t count, offset_t offset) {         \
        static auto real = next<ssize_t(int, const void*, size_t, offset_t)>(#name);         \
        BY_DESCRIPTOR(WRITE, descriptor)                                                     \
        if (action == SHORT || action == KILL_SHORT) count = (count + 1) / 2;                \
        ssize_t done = real(descriptor, bytes, count, offset);                               \
        if (action == KILL_SHORT) die();                                                     \
        return ended(action, done);                                                          \
    }
WRITES_AT(pwrite, off_t)
WRITES_AT(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec* parts, int count) {
    static auto real = next<ssize_t(int, const struct iovec*, int)>("writev");
    BY_DESCRIPTOR(WRITE, descriptor)
    ssize_t done = real(descriptor, parts, (action == SHORT || action == KILL_SHORT) && count > 1 ? count / 2 : count);
    if (action == KILL_SHORT) die();
    return ended(action, done);
}

#define COPIES(name, offset_t)                                                               \
    ssize_t name(int to, int from, offset_t* offset, size_t count) {                         \
        static auto real = next<ssize_t(int, int, offset_t*, size_t)>(#name);                \
        BY_DESCRIPTOR(WRITE, to)                                                             \
        if (action == SHORT || action == KILL_SHORT) count = (count + 1) / 2;                \
        ssize_t done = real(to, from, offset, count);                                        \
        if (action == KILL_SHORT) die();                                                     \
        return ended(action, done);                                                          \
    }
COPIES(sendfile, off_t)
COPIES(sendfile64, off64_t)

ssize_t read(int descriptor, void* bytes, size_t count) {
    static auto real = next<ssize_t(int, void*, size_t)>("read");
    BY_DESCRIPTOR(READ, descriptor)
    if (action == SHORT) count = (count + 1) / 2;
    return ended(action, real(descriptor, bytes, count));
}

#define ON_DESCRIPTOR(name, call)                                                            \
    int name(int descriptor) {                                                               \
        static auto real = next<int(int)>(#name);                                            \
        BY_DESCRIPTOR(call, descriptor)                                                      \
        return ended(action, real(descriptor));                                              \
    }
ON_DESCRIPTOR(fsync, FLUSH)
ON_DESCRIPTOR(fdatasync, FLUSH)

#define WITH_NUMBER(name, call, number_t)                                                    \
    int name(int descriptor, number_t number) {                                              \
        static auto real = next<int(int, number_t)>(#name);                                  \
        BY_DESCRIPTOR(call, descriptor)                                                      \
        return ended(action, real(descriptor, number));                                      \
    }
WITH_NUMBER(ftruncate, TRUNCATE, off_t)
WITH_NUMBER(ftruncate64, TRUNCATE, off64_t)
WITH_NUMBER(flock, LOCK, int)
WITH_NUMBER(fchmod, CHMOD, mode_t)

int rename(const char* from, const char* to) {
    static auto real = next<int(const char*, const char*)>("rename");
    BY_NAME(RENAME, AT_FDCWD, to)
    return ended(action, real(from, to));
}

int renameat(int from_folder, const char* from, int to_folder, const char* to) {
    static auto real = next<int(int, const char*, int, const char*)>("renameat");
    BY_NAME(RENAME, to_folder, to)
    return ended(action, real(from_folder, from, to_folder, to));
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
    static auto real = next<int(int, const char*, int, const char*, unsigned)>("renameat2");
    BY_NAME(RENAME, to_folder, to)
    return ended(action, real(from_folder, from, to_folder, to, flags));
}

int unlink(const char* name) {
    static auto real = next<int(const char*)>("unlink");
    BY_NAME(UNLINK, AT_FDCWD, name)
    return ended(action, real(name));
}

int rmdir(const char* name) {
    static auto real = next<int(const char*)>("rmdir");
    BY_NAME(RMDIR, AT_FDCWD, name)
    return ended(action, real(name));
}

int unlinkat(int folder, const char* name, int flags) {
    static auto real = next<int(int, const char*, int)>("unlinkat");
    BY_NAME(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, name)
    return ended(action, real(folder, name, flags));
}

int mkdir(const char* name, mode_t mode) {
    static auto real = next<int(const char*, mode_t)>("mkdir");
    BY_NAME(MKDIR, AT_FDCWD, name)
    return ended(action, real(name, mode));
}

int mkdirat(int folder, const char* name, mode_t mode) {
    static auto real = next<int(int, const char*, mode_t)>("mkdirat");
    BY_NAME(MKDIR, folder, name)
    return ended(action, real(folder, name, mode));
}

int chmod(const char* name, mode_t mode) {
    static auto real = next<int(const char*, mode_t)>("chmod");
    BY_NAME(CHMOD, AT_FDCWD, name)
    return ended(action, real(name, mode));
}

int fchmodat(int folder, const char* name, mode_t mode, int flags) {
    static auto real = next<int(int, const char*, mode_t, int)>("fchmodat");
    BY_NAME(CHMOD, folder, name)
    return ended(action, real(folder, name, mode, flags));
}
}
