// Declares the part of Python's stable ABI that libffcv.cpp uses: a module without functions, because FFCV calls its
// library through ctypes. Every CPython since 3.2 with a global interpreter lock has this layout
// (docs.python.org/3/c-api/stable.html), so python3-dev is not needed, and one build works with all these versions.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define PyMODINIT_FUNC extern "C" __attribute__((visibility("default"))) PyObject *
#define PyModuleDef_HEAD_INIT {{1, NULL}, NULL, 0, NULL}
#define PyModule_Create(definition) PyModule_Create2(definition, 3) // 3: the version of the stable ABI

extern "C" {

typedef intptr_t Py_ssize_t;

typedef struct { Py_ssize_t ob_refcnt; void *ob_type; } PyObject;

struct PyMethodDef { const char *name; void *function; int flags; const char *doc; };

struct PyModuleDef_Base { PyObject ob_base; void *m_init; Py_ssize_t m_index; PyObject *m_copy; };

struct PyModuleDef {
    PyModuleDef_Base m_base;
    const char *m_name, *m_doc;
    Py_ssize_t m_size;
    PyMethodDef *m_methods;
    void *m_slots, *m_traverse, *m_clear, *m_free;
};

PyObject *PyModule_Create2(PyModuleDef *, int);

}
