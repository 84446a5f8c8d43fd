#include "system.h"

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "pool.h"

#if defined(_WIN32)
#define NOMINMAX
#include <io.h>
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif
#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace barefoot {
namespace {

constexpr int64_t kLargestRead = 1 << 30;  // below every system's limit for one call

int64_t read_some(int fd, int64_t offset, uint8_t* data, int64_t size) {
#if defined(_WIN32)
  OVERLAPPED at = {};
  at.Offset = static_cast<DWORD>(offset);
  at.OffsetHigh = static_cast<DWORD>(offset >> 32);
  DWORD got = 0;
  if (!ReadFile(reinterpret_cast<HANDLE>(_get_osfhandle(fd)), data, static_cast<DWORD>(size), &got, &at)) {
    if (GetLastError() == ERROR_HANDLE_EOF) return 0;
    errno = EIO;
    return -1;
  }
  return got;
#else
  ssize_t got;
  do got = pread(fd, data, static_cast<size_t>(size), static_cast<off_t>(offset));
  while (got < 0 && errno == EINTR);
  return got;
#endif
}

size_t page_bytes() {
#if defined(_WIN32)
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return info.dwPageSize;
#else
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
#endif
}

#if defined(__linux__) && defined(__x86_64__)
// Tiles of bfloat16 (AMX-BF16), AVX512-BF16 and -VBMI, which fill them, and -VPOPCNTDQ, which every such processor has.
bool has_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 1), others = (c >> 1 & 1) && (c >> 14 & 1);
  return tiles && others && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// The kernel keeps 8 KiB more state for every thread of a process that uses tiles, so it wants to be asked first.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

int64_t read_fully(int fd, int64_t offset, uint8_t* data, int64_t size) {
  int64_t done = 0;
  while (done < size) {
    const int64_t got = read_some(fd, offset + done, data + done, std::min(size - done, kLargestRead));
    if (got < 0) return -1;
    if (got == 0) break;
    done += got;
  }
  return done;
}

void populate_pages(uint8_t* data, size_t size) {
  if (size == 0) return;
  const size_t page = page_bytes();
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; headers may be older than the kernel
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + size;
  constexpr uintptr_t kSlice = 32 << 20;  // a task's: clearing pages is all that happens until the first is filled
  std::atomic<bool> refused{false};
  parallel_for(static_cast<int64_t>((end - begin + kSlice - 1) / kSlice), n_threads(), [&](int64_t i, int) {
    const uintptr_t from = begin + static_cast<uintptr_t>(i) * kSlice;
    const uintptr_t n = end - from < kSlice ? end - from : kSlice;
    if (madvise(reinterpret_cast<void*>(from), n, kPopulateWrite) != 0) refused = true;
  });
  if (!refused) return;
#endif
  volatile uint8_t* touched = data;
  for (size_t at = 0; at < size; at += page) touched[at] = touched[at];
  touched[size - 1] = touched[size - 1];
}

CpuFeatures cpu_features() {
  CpuFeatures found;
#if defined(__x86_64__) && !defined(_MSC_VER)
  __builtin_cpu_init();
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  found.avx512 = found.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  found.avx512_vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(__linux__)
  found.amx = found.avx512_vnni && has_amx_bf16() && may_use_tiles();
#endif
#elif defined(_M_X64)
  int leaf1[4], leaf7[4];
  __cpuidex(leaf1, 1, 0);
  __cpuidex(leaf7, 7, 0);
  const auto bit = [](int word, int i) { return ((word >> i) & 1) != 0; };
  const bool os_saves = bit(leaf1[2], 27);
  const auto saved = os_saves ? _xgetbv(0) : 0;
  found.avx2 = (saved & 0x06) == 0x06 && bit(leaf1[2], 12) && bit(leaf1[2], 29) && bit(leaf7[1], 5);
  found.avx512 = found.avx2 && (saved & 0xE6) == 0xE6 && bit(leaf7[1], 16) && bit(leaf7[1], 17) &&
                 bit(leaf7[1], 30) && bit(leaf7[1], 31);
  found.avx512_vnni = found.avx512 && bit(leaf7[2], 11);
#elif defined(__APPLE__) && defined(__aarch64__)
  found.neon_dotprod = true;  // every Apple processor that runs macOS has it
#elif defined(__linux__) && defined(__aarch64__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  found.neon_dotprod = (getauxval(AT_HWCAP) & kDotProduct) != 0;
#endif
  return found;
}

}  // namespace barefoot
