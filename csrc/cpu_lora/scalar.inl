// Element types and their scalar conversions. Included inside the including file's own namespace.

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float to_float(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = (v.bits >> 10) & 31, mantissa = v.bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) {
    const float value = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -value : value;
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class T>
inline T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  const uint32_t bits = float_to_bits(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{uint16_t((bits >> 16) | 64)};  // NaN stays NaN
  return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};               // to nearest, ties to even
}
template <>
inline f16 from_float<f16>(float v) {
  const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return f16{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};  // rounds to 65536 and more: infinity
  if (magnitude < 0x38800000) {                                      // subnormal: let the FPU round, in units of 2^-24
    const float scaled = bits_to_float(magnitude) + 0.5f;
    return f16{uint16_t(sign | (float_to_bits(scaled) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return f16{uint16_t(sign | ((rounded >> 13) - (112 << 10)))};
}
