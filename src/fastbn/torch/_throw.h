/* SPDX-License-Identifier: BSD-3-Clause
 * Throws an exception of PyTorch's C++ from C: the kind and the words that its own kernel's
 * had. Constructors are looked up in libc10 (Itanium ABI); without one, the process is not
 * left without an exception: aoti_torch_check's, a RuntimeError, is thrown. */
#ifndef FASTBN_THROW_H
#define FASTBN_THROW_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _MSC_VER
#define THREAD_LOCAL __declspec(thread)
#else
#define THREAD_LOCAL _Thread_local
#endif

enum { THROWN_KINDS = 5, EXCEPTION_SIZE = 1024 };
#define CANNOT_CALL "PyTorch's own kernel could not be called"

/* c10::SourceLocation and std::string, as libstdc++ and the Itanium ABI pass them. */
struct location { const char *function, *file; uint32_t line; };
struct string { char *data; size_t size; char here[16]; };

typedef void (*constructor_t)(void *self, struct location at, struct string *words);
typedef void (*check_t)(int ok, const char *function, const char *file, uint32_t line,
                        const char *words);

static struct { constructor_t construct; void *typeinfo; } throwers[THROWN_KINDS];
static void *(*allocate_exception)(size_t);
static void (*throw_exception)(void *, void *, void (*)(void *));
static check_t plain_check;
static THREAD_LOCAL char *failure;
static THREAD_LOCAL int failure_kind;

static inline void set_thrower(int kind, void *constructor, void *typeinfo)
{
    throwers[kind].construct = (constructor_t)constructor;
    throwers[kind].typeinfo = typeinfo;
}

static inline void set_allocator(void *allocate, void *throw_, void *check)
{
    allocate_exception = (void *(*)(size_t))allocate;
    throw_exception = (void (*)(void *, void *, void (*)(void *)))throw_;
    plain_check = (check_t)check;
}

static inline int failed(void) { return failure != NULL; }

static inline void keep_failure(int kind, const char *text, size_t length)
{
    free(failure);
    failure = (char *)malloc(length + 1);
    if (failure != NULL) {
        memcpy(failure, text, length);
        failure[length] = 0;
    }
    failure_kind = kind;
}

/* The first entry of the table of virtual functions: the destructor. */
static void destroy_exception(void *self) { (*(void (***)(void *))self)[0](self); }

static inline void throw_failure(void)
{
    static THREAD_LOCAL char words[4096];
    int kind = failure_kind;
    struct location at = {"fastbn", "fastbn", 0};
    struct string text;
    void *exception;
    strncpy(words, failure, sizeof words - 1);
    free(failure);
    failure = NULL;
    if (throwers[kind].construct == NULL || throwers[kind].typeinfo == NULL
        || allocate_exception == NULL || throw_exception == NULL)
        plain_check(0, "fastbn", "fastbn", 0, words);
    exception = allocate_exception(EXCEPTION_SIZE);
    memset(exception, 0, EXCEPTION_SIZE);
    text.size = strlen(words);
    text.data = text.here;
    if (text.size > 15)     /* the constructor takes the memory over, or leaves it: 4 KB at most */
        text.data = (char *)malloc(text.size + 1);
    memcpy(text.data, words, text.size + 1);
    if (text.size > 15)
        memcpy(text.here, &text.size, sizeof text.size);
    throwers[kind].construct(exception, at, &text);
    if (text.data != text.here)
        free(text.data);
    throw_exception(exception, throwers[kind].typeinfo, destroy_exception);
}

#endif
