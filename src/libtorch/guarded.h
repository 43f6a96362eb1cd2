// What keeps C++ exceptions from leaving the C interface.

#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <exception>

// Returns null on success, or a message allocated with strdup.
template <typename Body>
char *guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}
