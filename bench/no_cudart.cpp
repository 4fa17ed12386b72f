// Stands for CUDA's runtime where no GPU is: a launch does nothing but count. Linked with the objects of trtkern._cuda
// by trtkern/bench/stand_ins.py, whose process measures the time of the host; what the kernels would have written is
// not there. No header of CUDA's is needed: these are the functions that nvcc's code calls, with the types that they
// pass.

#include <cstddef>

namespace {

struct Size {
  unsigned x, y, z;
};

long launches = 0;
int device = 0;

}  // namespace

extern "C" {

#define VISIBLE __attribute__((visibility("default")))

VISIBLE long trtkern_launches() { return launches; }

// What the compiler registers when the extension is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, Size*, Size*, int*) {}

// kernel<<<grid, block, shared, stream>>>(...): what is pushed here comes back in the kernel's own stub, which
// launches.
unsigned __cudaPushCallConfiguration(Size, Size, size_t, void*) { return 0; }
int __cudaPopCallConfiguration(Size* grid, Size* block, size_t* shared, void* stream) {
  *grid = *block = {1, 1, 1};
  *shared = 0;
  *static_cast<void**>(stream) = nullptr;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return 0;
}
int __cudaLaunchKernel(void*, Size, Size, void**, size_t, void*) {
  ++launches;
  return 0;
}
int cudaLaunchKernel(const void*, Size, Size, void**, size_t, void*) {
  ++launches;
  return 0;
}

int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaGetDevice(int* current) {
  *current = device;
  return 0;
}
int cudaSetDevice(int wanted) {
  device = wanted;
  return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorName(int) { return "none"; }
const char* cudaGetErrorString(int) { return "none"; }

}  // extern "C"
