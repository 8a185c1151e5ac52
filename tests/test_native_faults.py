"""System calls that stop short, are interrupted, or fail: made to by a preloaded library.

Regular files hardly ever show these outcomes, yet network file systems and full disks do. The
library stands before the C library's own calls and, for files whose name holds "faulty", does what
the environment variable FAULT says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"),
    reason="needs a C compiler and LD_PRELOAD",
)

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_uint calls;

static int faulty(int fd, const char *fault) {
    const char *wanted = getenv("FAULT");
    char link[64], path[4096];
    if (wanted == NULL || strcmp(wanted, fault) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strstr(path, "faulty") != NULL;
}
static int fail(int code) { errno = code; return -1; }
static int every_other(void) { return calls++ % 2 == 0; }
static size_t at_most(size_t count, size_t limit) { return count < limit ? count : limit; }

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

ssize_t pread(int fd, void *buf, size_t count, off_t offset) {
    if (faulty(fd, "short")) {
        if (every_other()) return fail(EINTR);
        count = at_most(count, 1000);
    }
    if (faulty(fd, "eio") && offset >= 5000) return fail(EIO);
    if (faulty(fd, "vanish") && offset >= 5000) return 0;
    return REAL(pread)(fd, buf, count, offset);
}
ssize_t pread64(int fd, void *buf, size_t count, off_t offset) { return pread(fd, buf, count, offset); }

ssize_t pwrite(int fd, const void *buf, size_t count, off_t offset) {
    if (faulty(fd, "short")) {
        if (every_other()) return fail(EINTR);
        count = at_most(count, 1000);
    }
    if (faulty(fd, "enospc") && offset >= 5000) return fail(ENOSPC);
    if (faulty(fd, "enospc")) count = at_most(count, 5000 - (size_t) offset);
    if (faulty(fd, "nothing")) return 0;
    return REAL(pwrite)(fd, buf, count, offset);
}
ssize_t pwrite64(int fd, const void *buf, size_t count, off_t offset) { return pwrite(fd, buf, count, offset); }

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t count, unsigned flags) {
    if (faulty(out, "short")) {
        if (every_other()) return fail(EINTR);
        count = at_most(count, 1000);
    }
    if (faulty(out, "half")) {
        if (*to >= 4000) return fail(EXDEV);
        count = at_most(count, 4000 - (size_t) *to);
    }
    if (faulty(out, "zero")) return 0;
    if (faulty(out, "exdev")) return fail(EXDEV);
    if (faulty(out, "enosys")) return fail(ENOSYS);
    if (faulty(out, "einval")) return fail(EINVAL);
    if (faulty(out, "eopnotsupp")) return fail(EOPNOTSUPP);
    if (faulty(out, "eperm")) return fail(EPERM);
    if (faulty(out, "enospc") || faulty(out, "copy-enospc")) return fail(ENOSPC);
    return REAL(copy_file_range)(in, from, out, to, count, flags);
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
    if (faulty(fd, "short") && every_other()) return fail(EINTR);
    if (faulty(fd, "eopnotsupp")) return fail(EOPNOTSUPP);
    if (faulty(fd, "enospc")) return fail(ENOSPC);
    return REAL(fallocate)(fd, mode, offset, length);
}
int fallocate64(int fd, int mode, off_t offset, off_t length) { return fallocate(fd, mode, offset, length); }

int fsync(int fd) {
    if (faulty(fd, "einval")) return fail(EINVAL);
    if (faulty(fd, "eio")) return fail(EIO);
    return REAL(fsync)(fd);
}
int fdatasync(int fd) {
    if (faulty(fd, "eio")) return fail(EIO);
    return REAL(fdatasync)(fd);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    const char *fault = getenv("FAULT");
    if (fault != NULL && strcmp(fault, "einval") == 0) return fail(EINVAL);
    return REAL(renameat2)(a, from, b, to, flags);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg) {
    const char *fault = getenv("FAULT");
    if (fault != NULL && strcmp(fault, "threads") == 0 && calls++ >= 1) return EAGAIN;
    return REAL(pthread_create)(thread, attr, start, arg);
}
"""

PRELUDE = """
import errno, os, sys
from reap_stream import _native
directory, source, target = (sys.argv[1] + name for name in ("", "/faulty-source", "/faulty-target"))
content = bytes(i * i % 251 for i in range(20_000))
def put(path, data):
    with open(path, "wb") as file:
        file.write(data)
def get(path):
    with open(path, "rb") as file:
        return file.read()
def code_of(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno], os.path.basename(error.filename)
    return None
put(source, content)
put(target, bytes(20_000))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(SHIM)
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl", "-pthread"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "shim.so"


@pytest.fixture
def under(shim, tmp_path):
    """Run a program under a fault, in an interpreter of its own."""

    def run(fault, program):
        # A sanitizer's library, where one is preloaded, must stay the first.
        preloaded = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(shim)]))
        environment = os.environ | {"LD_PRELOAD": preloaded, "FAULT": fault}
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + program, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


def test_short_and_interrupted_reads_go_on(under):
    under(
        "short",
        "out = bytearray(19_993)\n"
        "assert _native.read_ranges([source], [(0, 7, 19_993)], [out]) == 19_993\n"
        "assert out == content[7:]",
    )


def test_short_and_interrupted_writes_go_on(under):
    under(
        "short",
        "assert _native.write_ranges([target], [(0, 5, 20_000)], [content]) == 20_000\n"
        "assert get(target) == bytes(5) + content",
    )


def test_a_read_error_is_the_systems_own(under):
    under(
        "eio",
        "got = code_of(_native.read_ranges, [source], [(0, 4000, 500), (0, 6000, 9)],"
        " [bytearray(500), bytearray(9)])\n"
        "assert got == ('EIO', 'faulty-source'), got",
    )


def test_a_file_that_shrinks_while_it_is_read(under):
    under(
        "vanish",
        "try:\n"
        "    _native.read_ranges([source], [(0, 6000, 100)], [bytearray(100)])\n"
        "except EOFError as error:\n"
        "    assert 'wanted 100 bytes at offset 6000, got 0' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('no error')",
    )


@pytest.mark.parametrize(("fault", "code"), [("enospc", "ENOSPC"), ("nothing", "EIO")])
def test_a_write_error_is_the_systems_own(under, fault, code):
    under(
        fault,
        "got = code_of(_native.write_ranges, [target], [(0, 0, 20_000)], [content])\n"
        f"assert got == ('{code}', 'faulty-target'), got",
    )


@pytest.mark.parametrize(
    "fault", ["short", "half", "zero", "exdev", "enosys", "einval", "eopnotsupp", "eperm"]
)
def test_a_copy_goes_on_where_the_kernel_does_not(under, fault):
    under(
        fault,
        "assert _native.copy_ranges([source], [target], [(0, 1, 0, 0, 19_999)]) == 19_999\n"
        "assert get(target) == content[1:] + bytes(1)",
    )


def test_a_full_disk_ends_a_copy(under):
    under(
        "copy-enospc",
        "got = code_of(_native.copy_ranges, [source], [target], [(0, 0, 0, 0, 20_000)])\n"
        "assert got == ('ENOSPC', 'faulty-source'), got",
    )


def test_preallocate_where_the_file_system_reserves_nothing(under):
    under(
        "eopnotsupp",
        "_native.preallocate(target + '-new', 9999)\nassert get(target + '-new') == bytes(9999)",
    )


def test_preallocate_goes_on_when_interrupted(under):
    under("short", "_native.preallocate(target, 9999)\nassert get(target) == bytes(9999)")


def test_preallocate_on_a_full_disk_leaves_nothing(under):
    under(
        "enospc",
        "got = code_of(_native.preallocate, target + '-new', 9999)\n"
        "assert got == ('ENOSPC', 'faulty-target-new'), got\n"
        "assert not os.path.exists(target + '-new')\n"
        "assert code_of(_native.preallocate, target, 9999) == ('ENOSPC', 'faulty-target')\n"
        "assert os.path.exists(target)",
    )


def test_sync_errors_are_not_lost(under):
    under("eio", "assert code_of(_native.sync_file, target) == ('EIO', 'faulty-target')")


def test_a_directory_that_cannot_be_synced_is_no_error(under):
    under(
        "einval", "os.mkdir(directory + '/faulty')\n_native.sync_directory(directory + '/faulty')"
    )


def test_exchange_says_when_the_system_cannot(under):
    under(
        "einval", "assert _native.exchange(source, target) is False\nassert get(source) == content"
    )


def test_work_is_done_by_fewer_threads_when_no_more_start(under):
    under(
        "threads",
        "out = bytearray(64 << 20)\n"
        "put(source, bytes(range(256)) * (256 << 10))\n"
        "assert _native.read_ranges([source], [(0, 0, 64 << 20)], [out], threads=8) == 64 << 20\n"
        "assert out == get(source)",
    )
