// AVX-512 with AMX: registers that are tiles of 16 x 64 bytes, and products of such tiles.
#pragma once
#define TK_WIDTH 16
#define TK_STREAM 64  // bytes of the widest streaming store
#define TK_ISA amx
