// A device's primary context, made current for a scope; the same context that torch uses.
#pragma once
#include "dynlib.h"

namespace lsp {

class OnDevice {
 public:
  explicit OnDevice(int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  bool ok() const { return error_ == 0; }
  int error() const { return error_; }  // a negative errno, the sentence is set

 private:
  int error_ = 0;
};

// Keeps a sentence naming the call and returns -EIO (-ENOMEM when the device is full), or 0 when code is 0.
int cuda_check(CUresult code, const char* what);

// The kernel of this name from the embedded fat binary on the current device, or null with the sentence set.
CUfunction kernel(int ordinal, const char* name);
// A stream of this extension's own on the device (created once), so that copies do not wait for the model's stream.
CUstream stream(int ordinal);

}  // namespace lsp
