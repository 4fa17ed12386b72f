// LIF forward on the CPU.
//
// No include guard: each instruction set includes it inside a namespace of its own, after lif_rows_cpu.h.

// One step forward of a block: v in place; s and v_out may be null; `bad` is NaN where an h was not finite.
template <class D>
struct ForwardRow {
  using Raw = typename D::Raw;
  Rows rows;
  const Raw* x;
  Raw *s, *v_out;
  float *v, *bad;
  int reset;
  const Raw* ahead;  // the row of x that comes next

  TK_INLINE ForwardRow at(int64_t i) const {
    ForwardRow r = *this;
    r.rows.base += i * rows.step, r.x += i, r.v += i, r.ahead += i;
    if (s) r.s += i;
    if (v_out) r.v_out += i;
    return r;
  }
  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(s ? s : v_out, n); }

  template <bool STREAM>
  TK_NOINLINE void whole(int64_t from, int64_t n) const {
    const ForwardRow r = at(from);
    vfloat seen = load(bad);
    for (int64_t i = 0; i < n; i += kLanes) {
      prefetch(r.ahead + i);
      const Neuron<vfloat> p = neuron(r.rows, i);
      const vfloat h = charge(p, load(r.v + i), get<D>(r.x + i));
      const vfloat after = reset_after(p, h, r.reset);
      seen = fma_(h, vfloat{}, seen);
      if (r.s) put<STREAM>(r.s + i, D::pack_exact(fire(p, h)));
      if (r.v_out) put<STREAM>(r.v_out + i, D::pack(after));
      store(r.v + i, after);
    }
    store(r.bad, seen);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    ForwardRow r = at(from);
    Raw *to_s = r.s, *to_v = r.v_out;
    Staged<Raw> new_x, new_s, new_v;
    const Kept kept(r.v);
    r.x = new_x.in(r.x, count), r.s = new_s.out(r.s), r.v_out = new_v.out(r.v_out);
    r.template whole<false>(0, kLanes);
    new_s.back(to_s, count), new_v.back(to_v, count);
    kept.restore(r.v, count);
  }
};

template <class D>
void forward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  using Raw = typename D::Raw;
  float *v = scratch, *parameters = scratch + kForwardBlock + kPad, bad[kLanes] = {};
  if (a.s && a.v && (a.s - a.v) % 64) streaming = false;  // a row is led to alignment for both at once
  for (int64_t n0 = begin, n = 0; n0 < end; n0 += n) {
    n = block_length(a, n0, end, kForwardBlock);
    const Rows rows = parameter_rows(a, n0, n, parameters);
    read_row(v, a.v0, n0, n);
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t at = t * a.N + n0, next = t + 1 < a.T ? at + a.N : n0 + n;
      ForwardRow<D> row = {rows, element<Raw>(a.x, at), element<Raw>(a.s, at), element<Raw>(a.v, at)};
      row.v = v, row.bad = bad, row.reset = a.reset, row.ahead = element<Raw>(a.x, next);
      if (streaming && (a.s || a.v)) {
        along<true>(row, n);
      } else {
        along<false>(row, n);
      }
      if (a.edges && (t + 1) % kChunk == 0 && t + 1 < a.T)
        write_row(a.edges, ((t + 1) / kChunk - 1) * a.N + n0, v, n, streaming);
    }
    if (a.v_final) write_row(a.v_final, n0, v, n, streaming);
  }
  for (int i = 0; i < kLanes; ++i)
    if (a.flag && bad[i] != 0.0f) __atomic_store_n((int32_t*)a.flag, 1, __ATOMIC_RELAXED);
  fence();
}

inline void lif_forward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  for_dtype(a.dtype, [&](auto d) { forward_blocks<decltype(d)>(a, begin, end, scratch, streaming); });
}
