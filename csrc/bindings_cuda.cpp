// SPDX-License-Identifier: Apache-2.0
// fastdistill._cuda: one line an entry point; addresses and the stream as integers, launch errors as RuntimeError.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;
using Address = uintptr_t;

const char* philox_cuda(const uint32_t* counter, const uint32_t* key, uint32_t* words, float* normals, int64_t n, void* stream);

namespace {

template <typename T> T* at(Address a) { return reinterpret_cast<T*>(a); }

void check(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + error);
}

void philox(Address counter, Address key, Address words, Address normals, int64_t n, Address stream) {
  check("philox4x32",
        philox_cuda(at<uint32_t>(counter), at<uint32_t>(key), at<uint32_t>(words), at<float>(normals), n, at<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels on raw addresses. Call fastdistill.ops instead: it checks what is unchecked here.";
  m.def("philox4x32", &philox, py::call_guard<py::gil_scoped_release>(),
        "words[n, 4] and normals[n, 4] of counter[n, 4] under key[2], on the device and the stream");
}
