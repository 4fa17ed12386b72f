// Any processor: vectors of 4 floats, which SSE2 and NEON have.
#pragma once
#define TK_WIDTH 4
#define TK_STREAM 16  // bytes of the widest streaming store
#define TK_ISA baseline
