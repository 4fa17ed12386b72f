// Walks the grids of the CUDA kernels by their index functions alone: every neuron owned once, every number added up
// once, no offset past 64 bits. Prints what is wrong; exit status 1 then (tests/test_cuda_threads.py).
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "cuda/index.h"

using namespace trtkern::index;

static int failures = 0;
static void expect(bool holds, const char* what, std::initializer_list<int64_t> of) {
  if (holds || ++failures > 20) return;
  std::printf("%s, but not for", what);
  for (int64_t value : of) std::printf(" %lld", static_cast<long long>(value));
  std::printf("\n");
}
#define EXPECT(condition, ...) expect(condition, #condition, {__VA_ARGS__})

static void owners(int64_t N, int vec) {
  std::vector<int> owned(N, 0);
  for (int64_t block = 0; block < blocks(N, vec); ++block) {
    for (int thread = 0; thread < kThreads; ++thread) {
      const int64_t n = first_neuron(block, thread, vec);
      if (n >= N) continue;
      EXPECT(n >= 0 && n + vec <= N, N, vec, n);
      for (int j = 0; j < vec && n + j < N; ++j) ++owned[n + j];
    }
  }
  for (int64_t n = 0; n < N; ++n) EXPECT(owned[n] == 1, N, vec, n);
}

// Where a walk would take too long: neighbouring threads own neighbouring neurons, the first owns the first, the last
// block is needed, and offsets equal 128-bit arithmetic.
static void huge(int64_t T, int64_t N, int vec) {
  const int64_t last = blocks(N, vec) - 1;
  EXPECT(first_neuron(0, 0, vec) == 0, N, vec);
  EXPECT(first_neuron(last, 0, vec) < N, N, vec);
  EXPECT(first_neuron(last, kThreads - 1, vec) + vec >= N, N, vec);
  for (int64_t block : {int64_t{0}, last / 3, last / 2, last - 1, last}) {
    if (block < 0) continue;
    EXPECT(first_neuron(block + 1, 0, vec) == first_neuron(block, kThreads - 1, vec) + vec, N, vec, block);
    for (int thread = 0; thread < kThreads; ++thread) {
      const int64_t n = first_neuron(block, thread, vec);
      EXPECT(first_neuron(block, thread + 1, vec) == n + vec, N, vec, block, thread);
      if (n >= N) continue;
      for (int64_t t : {int64_t{0}, T / 2, T - 1}) {
        const __int128 wide = static_cast<__int128>(t) * N + n;
        EXPECT(offset(t, n, N) == wide && offset(t, n, N) + vec <= T * N, T, N, t, n);
      }
    }
  }
}

static void channels(int64_t N, int64_t C, int64_t inner) {
  Channel at = Channel::of(0, inner, C);
  for (int64_t n = 0; n < N; ++n, at.step(inner, C)) {
    const Channel here = Channel::of(n, inner, C);
    EXPECT(here.channel == (n / inner) % C && here.place == n % inner, N, C, inner, n);
    EXPECT(at.channel == here.channel && at.place == here.place, N, C, inner, n);
  }
}

static void sums(int64_t M, int64_t C, int64_t inner, int rows) {
  const Reduction r{M, C, inner};
  std::vector<int> added(rows * M, 0), written(rows * r.segments() * C, 0);
  for (int64_t block = 0; block < r.blocks(rows); ++block) {
    const Reduction::Place place = r.place(block, rows);
    EXPECT(place.row >= 0 && place.row < rows && place.segment < r.segments(), M, C, inner, block);
    for (int thread = 0; thread < kReduceThreads; ++thread) {
      const int64_t c = r.channel(place.tile, thread);
      if (c >= C) continue;
      // One lane of a channel writes its sum: the first of those that share the channel.
      if (thread < (r.narrow() ? kReduceLanes : 1)) ++written[(place.segment * rows + place.row) * C + c];
      for (int64_t k = place.segment * r.span() + r.start(thread); k < (place.segment + 1) * r.span();
           k += r.stride()) {
        const int64_t m = k < r.members() ? r.member(k, c) : M;
        if (m >= M) continue;
        EXPECT((m / inner) % C == c, M, C, inner, m, c);
        ++added[place.row * M + m];
      }
    }
  }
  for (int count : added) EXPECT(count == 1, M, C, inner, count);
  for (int count : written) EXPECT(count == 1, M, C, inner, count);
}

// Blocks that keep to channels: each number owned once, by a thread whose sums go to its channel, counted right.
static void tiles(int64_t outer, int64_t C, int64_t inner, int vec, int threads, int rounds) {
  const int64_t N = outer * C * inner;
  const Tiles t = Tiles::of(N, C, inner, vec, threads, rounds);
  const bool keeps = C == 1 ? N % vec == 0 : inner % vec == 0 || (inner == 1 && C % vec == 0);
  EXPECT((t.groups != 0) == keeps, N, C, inner, vec);
  if (t.groups == 0) return;
  EXPECT(t.N() == N && t.C() == C, N, C, inner, vec);
  std::vector<int> owned(N, 0), written(t.segments() * C, 0);
  for (int64_t block = 0; block < t.blocks(); ++block) {
    std::vector<int64_t> counts(t.outputs(), 0);
    for (int o = 0; o < t.outputs(); ++o) ++written[t.place(block, o)];
    for (int i = 0; i < threads * rounds; ++i) {
      const int thread = i % threads, column = thread & ((1 << t.shift) - 1);
      const int64_t n = t.first_neuron(block, thread, i / threads);
      EXPECT(n <= N, N, C, inner, vec, n);
      for (int j = 0; j < vec && n < N; ++j) {
        const int o = column * t.lanes + (t.lanes == 1 ? 0 : j);
        EXPECT(t.place(block, o) % C == (n + j) / inner % C, N, C, inner, vec, n + j);
        ++owned[n + j], ++counts[o];
      }
    }
    for (int64_t count : counts) EXPECT(count == t.count(t.segment(block)), N, C, inner, vec, block, count);
  }
  for (int count : owned) EXPECT(count == 1, N, C, inner, vec, count);
  for (int count : written) EXPECT(count == 1, N, C, inner, vec, count);
}

// Pooling: each neuron belongs to one average, that of the place that it is in, and the packs of an average cover it.
static void pools(int64_t images, int64_t height, int64_t width, int64_t inner, int vec) {
  const Pool p{width * inner, inner};
  const int64_t N = images * height * width * inner;
  std::vector<int> members(N / 4, 0), covered(N, 0);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t i = n % inner, x = n / inner % width, y = n / (inner * width);  // rows of all images
    EXPECT(p.pooled(n) == ((y / 2) * (width / 2) + x / 2) * inner + i, N, width, inner, n);
    ++members[p.pooled(n)];
  }
  for (int count : members) EXPECT(count == 4, N, width, inner, count);
  if (!p.over(vec) && !p.beside(vec)) return;
  for (int64_t m = 0; m < N / 4; m += vec) {
    for (int q = 0; q < 4; ++q) {
      for (int j = 0; j < vec; ++j) {
        const int64_t n = p.first(m) + p.apart(q, vec) + j;
        ++covered[n];
        EXPECT(p.pooled(n) == (p.over(vec) ? m + j : m + (q & 1) * vec / 2 + j / 2), N, width, inner, vec, m, q, j);
      }
    }
  }
  for (int count : covered) EXPECT(count == 1, N, width, inner, vec, count);
}

int main() {
  for (int64_t N : {1, 2, 7, 63, 64, 65, 127, 1009, 4099}) owners(N, 1);
  for (int vec : {4, 8}) {
    for (int64_t N : {1, 3, 63, 64, 65, 511, 1009}) owners(N * vec, vec);
  }
  // T * N past 2^31, N past 2^31, and the most that a grid holds.
  for (int vec : {1, 4, 8}) {
    for (int64_t N : {int64_t{536870920}, int64_t{2147483656}, int64_t{1} << 33, kMaxBlocks * kThreads * 8}) {
      for (int64_t T : {1, 4, 17, 1000}) huge(T, N, vec);
    }
  }
  huge(5, 429496731, 1);  // a prime, 5 N just past 2^31
  for (int64_t C : {1, 2, 3, 5, 33}) {
    for (int64_t inner : {1, 2, 7, 31, 32, 100}) {
      channels(3 * C * inner, C, inner);
      for (int64_t outer : {1, 3, 40}) sums(outer * C * inner, C, inner, 5);
    }
  }
  for (int64_t M : {1, 255, 4096, 4097, 20000}) sums(M, 1, 1, 5);
  for (int vec : {1, 4, 8}) {
    for (int64_t C : {1, 2, 3, 8, 12, 24, 64, 96}) {
      for (int64_t inner : {1, 2, 4, 7, 8, 32, 100}) {
        for (int64_t outer : {1, 3, 40}) {
          tiles(outer * vec, C, inner, vec, kThreads, 1);
          tiles(outer * vec, C, inner, vec, 256, 4);
        }
      }
    }
    for (int64_t width : {2, 6, 8, 16, 32}) {
      for (int64_t inner : {1, 3, 4, 8, 24}) pools(3, 4, width, inner, vec);
    }
  }
  const Tiles wide = Tiles::of(int64_t{3} << 40, 3, int64_t{1} << 40, 8, 256, 4);
  EXPECT(wide.first_neuron(wide.blocks() - 1, 255, 3) == (int64_t{3} << 40) - 8, wide.blocks());
  const Channel far = Channel::of((int64_t{1} << 40) + 12345, int64_t{1} << 33, 7);
  EXPECT(far.channel == 128 % 7 && far.place == 12345, far.channel, far.place);
  return failures != 0;
}
