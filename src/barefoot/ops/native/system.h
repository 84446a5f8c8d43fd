// What the operating system and the processor offer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace barefoot {

// Fill data[0, size) from byte offset of fd. Returns the bytes read: fewer than size only at the end of the file;
// -1 with errno set on failure.
int64_t read_fully(int fd, int64_t offset, uint8_t* data, int64_t size);

// Make the pages of data[0, size) resident and writable; contents stay.
void populate_pages(uint8_t* data, size_t size);

struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_vnni = false, amx = false, neon_dotprod = false;
};
CpuFeatures cpu_features();

}  // namespace barefoot
