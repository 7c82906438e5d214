// The extension module that Python imports. It has no content: importing it loads the library, whose static
// initialisers register the operations with torch.

#include <Python.h>

// Weak: a program without Python, which loads the library for its operations, need not resolve it.
extern "C" PyObject* PyModule_Create2(PyModuleDef*, int) __attribute__((weak));

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
