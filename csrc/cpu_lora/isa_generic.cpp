// Plain C++: for machines without AVX2 and for other architectures; the compiler vectorises what it can.
#include "kernels.h"

namespace lsc {
namespace generic {
#include "scalar.inl"

template <class T>
struct Dot {
  static constexpr int kStep = 8;
  struct Acc {
    float v[kStep];
  };
  using Op = Acc;
  static Op load(const T* p) {
    Op op;
    for (int i = 0; i < kStep; ++i) op.v[i] = to_float(p[i]);
    return op;
  }
  static Acc zero() { return Acc{}; }
  static Acc fma(Acc a, const Op& x, const Op& y) {
    for (int i = 0; i < kStep; ++i) a.v[i] += x.v[i] * y.v[i];
    return a;
  }
  static float sum(const Acc& a) {
    float total = 0;
    for (int i = 0; i < kStep; ++i) total += a.v[i];
    return total;
  }
};

template <class T>
struct Vec {
  static constexpr int kLanes = 8;
  struct V {
    float v[kLanes];
  };
  static V load(const T* p) {
    V out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = to_float(p[i]);
    return out;
  }
  static V loadf(const float* p) {
    V out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = p[i];
    return out;
  }
  static void storef(float* p, const V& v) {
    for (int i = 0; i < kLanes; ++i) p[i] = v.v[i];
  }
  static void store(T* p, const V& v) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v.v[i]);
  }
  static V bcast(float s) {
    V out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = s;
    return out;
  }
  static V fma(V a, const V& x, const V& y) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += x.v[i] * y.v[i];
    return a;
  }
  static V add(V a, const V& b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  }
};

#include "tiles.inl"
}  // namespace generic

const Kernels& generic_kernels() {
  using namespace generic;
  static const Kernels kernels = {"generic",
                                  {shrink<bf16>, shrink<f16>, shrink<float>},
                                  {expand<bf16>, expand<f16>, expand<float>}};
  return kernels;
}
}  // namespace lsc
