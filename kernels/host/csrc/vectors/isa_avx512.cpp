#define LEAPALIGN_ISA avx512
#include "vectors/vector_avx512.h"

#include "vectors/table.h"
