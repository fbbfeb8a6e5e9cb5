#define LEAPALIGN_ISA avx512bw
#include "vectors/vector_avx512.h"

#include "vectors/table.h"
