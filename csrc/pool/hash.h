// The chosen host implementation of the page checksum (pages.cpp), for those who hash as bytes arrive.
#pragma once
#include <cstdint>

namespace lsp {

// The sum of the terms of one whole chunk of CHUNK bytes, which is the chunk-th of its page.
using ChunkHash = uint64_t (*)(const unsigned char* data, uint64_t chunk);
ChunkHash chunk_hash();

}  // namespace lsp
