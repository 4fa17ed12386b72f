// The grids of the LIF kernels, block by block and thread by thread. Included by cuda_threads.cpp.
#pragma once

// Shared memory comes with whatever was there: here NaN.
static std::vector<uint32_t> shared(int words, int threads = index::kThreads) {
  return std::vector<uint32_t>(static_cast<size_t>(words) * threads, 0x7fc00000u);
}

// Words of a thread in the forward pass.
template <class Kernel>
int forward_words(const LifArgs& a) {
  return shared_bytes<typename Kernel::E>(a, false) / (static_cast<int>(sizeof(uint32_t)) * index::kThreads);
}

template <class Kernel>
void forward_grid(const LifArgs& a) {
  const int64_t N = a.pool_row != 0 ? a.N / 4 : a.N;
  for (int64_t block = 0; block < index::blocks(N, Kernel::V); ++block) {
    auto words = shared(forward_words<Kernel>(a));
    for (int thread = 0; thread < index::kThreads; ++thread) {
      const int64_t n = index::first_neuron(block, thread, Kernel::V);
      if (n >= N) continue;
      const Words kept{words.data() + thread, index::kThreads};
      const uint32_t one = 1;
      bool finite;
      if constexpr (Kernel::ANY_ELEMENT) {
        finite = forward_neuron<Kernel>(a, n, kept);
      } else {
        finite = forward_thread<Kernel>(a, n, kept);
      }
      if (!finite && a.flag != 0) write<4>(a.flag, &one);
    }
  }
}

// A thread must have waited for all that it asked for.
static void nothing_on_its_way() {
  for (const auto& group : fetches) strays += group.size();
  fetches.assign(1, {});
}

template <class E>
void forward_ahead_grid(const LifArgs& a) {
  constexpr int V = Ahead<E>::V;
  for (int64_t block = 0; block < index::blocks(a.N, V); ++block) {
    auto words = shared(kForwardRing * kChunk);
    for (int thread = 0; thread < index::kThreads; ++thread) {
      const int64_t n = index::first_neuron(block, thread, V);
      if (n >= a.N) continue;
      const uint32_t one = 1;
      if (!forward_ahead<Ahead<E>>(a, n, {words.data() + thread, index::kThreads}) && a.flag != 0)
        write<4>(a.flag, &one);
      nothing_on_its_way();
    }
  }
}

// The sums of a block, as the kernels add them up but for the order within a block.
template <class S>
void leave_sums(const LifArgs& a, const index::Tiles& t, int64_t block, const S& first) {
  const int rows = sum_rows(a);
  const auto slots = [&first](int thread) { return S(first.words + thread, first.stride, first.more); };
  if (t.groups == 0 && (a.C > 1 || fused(a))) return;  // the threads have written theirs
  for (int r = 0; r < rows; ++r) {
    if (t.groups != 0 && t.outputs() > 1) {
      for (int o = 0; o < t.outputs(); ++o) {
        store_one(a.workspace, index::offset(r, t.place(block, o), t.segments() * t.C()), tile_sum(a, t, first, r, o));
      }
      continue;
    }
    float sum = 0.0f;
    for (int thread = 0; thread < index::kThreads; ++thread) sum += sum_of(a, slots(thread), r);
    store_one(a.workspace, index::offset(r, t.groups != 0 ? t.place(block, 0) : block, reduction(a).M), sum);
  }
}

template <class Kernel, int SURROGATE = 0>
void backward_grid(const LifArgs& a) {
  constexpr bool FUSED = Kernel::FUSED;
  if constexpr (SURROGATE < kSurrogates) {
    if (!FUSED && a.surrogate != SURROGATE) return backward_grid<Kernel, SURROGATE + 1>(a);
    using S = Slots<Kernel>;
    const index::Tiles t = tiles(a);
    const int rows = sum_rows(a);
    const int64_t blocks = t.groups != 0 ? t.blocks() : index::blocks(a.N, Kernel::V);
    for (int64_t block = 0; block < blocks; ++block) {
      auto words = shared(S::words_of(a));
      for (int thread = 0; thread < index::kThreads; ++thread) {
        const S slots(words.data() + thread, index::kThreads, S::more_rows(a));
        const int64_t n =
            t.groups != 0 ? t.first_neuron(block, thread, 0) : index::first_neuron(block, thread, Kernel::V);
        clear_sums(a, slots);
        if (n >= a.N) continue;
        if constexpr (Kernel::ANY_ELEMENT) {
          a.gparams != 0 ? backward_neuron<true>(a, n, slots) : backward_neuron<false>(a, n, slots);
        } else {
          backward_thread<FUSED ? kAnySurrogate : SURROGATE>(a, n, slots);
        }
        if ((a.gparams | a.norm_sums) != 0 && t.groups == 0 && (a.C > 1 || FUSED)) store_sums(a, rows, n, slots);
      }
      if ((a.gparams | a.norm_sums) != 0) leave_sums(a, t, block, S(words.data(), index::kThreads, S::more_rows(a)));
    }
  }
}

template <class E>
void backward_ahead_grid(const LifArgs& a) {
  constexpr int V = Ahead<E>::V;
  using Ring = RingOfSlots<Ahead<E>>;
  for (int64_t block = 0; block < index::blocks(a.N, V); ++block) {
    auto words = shared(Ring::words_of(a));
    for (int thread = 0; thread < index::kThreads; ++thread) {
      const Ring ring(a, words.data() + thread, index::kThreads);
      const int64_t n = index::first_neuron(block, thread, V);
      ring.clear(a);
      if (n < a.N) backward_ahead(a, n, ring);
      nothing_on_its_way();
      if (a.gparams == 0) continue;
      ring.add_up(a);
      if (n < a.N && a.C > 1) store_sums(a, kSums, n, ring.first);
    }
    if (a.gparams != 0) leave_sums(a, tiles(a), block, Ring(a, words.data(), index::kThreads).first);
  }
}

// The launch behind a pass with sums: all blocks, then what the last block of each tile of channels does besides.
static void add_up_grid(const LifArgs& a, const NormArgs& n) {
  const index::Reduction r = reduction(a);
  const int rows = sum_rows(a);
  for (int64_t block = 0; block < r.blocks(rows); ++block) {
    const index::Reduction::Place place = r.place(block, rows);
    float lanes[index::kReduceLanes] = {};
    for (int thread = 0; thread < index::kReduceThreads; ++thread) {
      lanes[r.narrow() ? thread % index::kReduceLanes : 0] += segment_sum(r, rows, a.workspace, block, thread);
    }
    for (int lane = 0; lane < (r.narrow() ? index::kReduceLanes : 1); ++lane) {
      const int64_t channel = r.channel(place.tile, lane);
      const int64_t row = place.segment * rows + place.row;
      if (channel < r.C) store_one(a.workspace, rows * r.M + index::offset(row, channel, r.C), lanes[lane]);
    }
  }
  for (int64_t tile = 0; tile < r.tiles(); ++tile) {
    const int64_t first = r.channel(tile, 0);
    const int channels = r.channels(tile);
    for (int i = 0; i < rows * channels; ++i) finish_sum(a, r, rows, norm_rows(a), i / channels, first + i % channels);
    for (int i = 0; n.C != 0 && i < channels; ++i) finish_sums(n, first + i);
  }
}

template <class E>
void run_as(const LifArgs& a, bool backward) {
  if (general(a)) {
    return choose_neuron(
        a, [&](auto kernel) { backward ? backward_grid<decltype(kernel)>(a) : forward_grid<decltype(kernel)>(a); });
  }
  if (ahead(a)) return backward ? backward_ahead_grid<E>(a) : forward_ahead_grid<E>(a);
  if (backward && fused(a)) return choose<E, true>(a, [&](auto kernel) { backward_grid<decltype(kernel)>(a); });
  if (backward) return choose<E, false>(a, [&](auto kernel) { backward_grid<decltype(kernel)>(a); });
  if (fused(a)) return choose<E, true>(a, [&](auto kernel) { forward_grid<decltype(kernel)>(a); });
  choose<E, false>(a, [&](auto kernel) { forward_grid<decltype(kernel)>(a); });
}
