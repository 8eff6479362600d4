// RUN: furiosa-llm opt %s --passes canonicalize --split-input-file | filecheck %s

// Ops that change nothing.
%x = "test.op"() : () -> tensor<2x3xf32>
%0 = nn.reshape %x : tensor<2x3xf32> -> tensor<2x3xf32>
%1 = nn.expand %0 : tensor<2x3xf32> -> tensor<2x3xf32>
%2 = nn.cast %1 : tensor<2x3xf32> -> tensor<2x3xf32>
%3 = nn.slice %2 dim 1 from 0 to 3 : tensor<2x3xf32> -> tensor<2x3xf32>
%4 = nn.transpose %3 dims 1, 1 : tensor<2x3xf32> -> tensor<2x3xf32>
%5 = nn.concat %4 dim 0 : tensor<2x3xf32> -> tensor<2x3xf32>
%6 = nn.scale %5 by 1.0 : tensor<2x3xf32>
%7 = nn.pow %6 to 1.0 : tensor<2x3xf32>
%8 = nn.neg %7 : tensor<2x3xf32>
%9 = nn.neg %8 : tensor<2x3xf32>
"test.op"(%9) : (tensor<2x3xf32>) -> ()
// CHECK:      %x = "test.op"()
// CHECK-NEXT: "test.op"(%x)

// -----

// Chains of views become one.
%x = "test.op"() : () -> tensor<2x12xf32>
%0 = nn.reshape %x : tensor<2x12xf32> -> tensor<2x3x4xf32>
%1 = nn.reshape %0 : tensor<2x3x4xf32> -> tensor<6x4xf32>
%2 = nn.transpose %1 dims 0, 1 : tensor<6x4xf32> -> tensor<4x6xf32>
%3 = nn.transpose %2 dims 0, 1 : tensor<4x6xf32> -> tensor<6x4xf32>
%4 = nn.slice %3 dim 0 from 1 to 5 : tensor<6x4xf32> -> tensor<4x4xf32>
%5 = nn.slice %4 dim 0 from 2 to 3 : tensor<4x4xf32> -> tensor<1x4xf32>
%6 = nn.expand %5 : tensor<1x4xf32> -> tensor<7x4xf32>
%7 = nn.expand %6 : tensor<7x4xf32> -> tensor<2x7x4xf32>
"test.op"(%7) : (tensor<2x7x4xf32>) -> ()
// CHECK:      [[FLAT:%.*]] = nn.reshape %x : tensor<2x12xf32> -> tensor<6x4xf32>
// CHECK-NEXT: [[ROW:%.*]] = nn.slice [[FLAT]] dim 0 from 3 to 4
// CHECK-NEXT: [[ROWS:%.*]] = nn.expand [[ROW]] : tensor<1x4xf32> -> tensor<2x7x4xf32>
// CHECK-NEXT: "test.op"([[ROWS]])

// -----

// Widening and back gives the same number; narrowing and back does not.
%x, %y = "test.op"() : () -> (tensor<4xbf16>, tensor<4xf32>)
%0 = nn.cast %x : tensor<4xbf16> -> tensor<4xf32>
%1 = nn.cast %0 : tensor<4xf32> -> tensor<4xbf16>
%2 = nn.cast %y : tensor<4xf32> -> tensor<4xbf16>
%3 = nn.cast %2 : tensor<4xbf16> -> tensor<4xf32>
"test.op"(%1, %3) : (tensor<4xbf16>, tensor<4xf32>) -> ()
// CHECK:      [[NARROW:%.*]] = nn.cast %y
// CHECK-NEXT: [[WIDE:%.*]] = nn.cast [[NARROW]]
// CHECK-NEXT: "test.op"(%x, [[WIDE]])

// -----

// A slice inside one part of a concat; a concat in a concat.
%x, %y = "test.op"() : () -> (tensor<2x4xf32>, tensor<2x6xf32>)
%0 = nn.concat %x, %y dim 1 : tensor<2x4xf32>, tensor<2x6xf32> -> tensor<2x10xf32>
%1 = nn.slice %0 dim 1 from 5 to 9 : tensor<2x10xf32> -> tensor<2x4xf32>
%2 = nn.slice %0 dim 1 from 3 to 5 : tensor<2x10xf32> -> tensor<2x2xf32>
%3 = nn.concat %x, %0 dim 1 : tensor<2x4xf32>, tensor<2x10xf32> -> tensor<2x14xf32>
"test.op"(%1, %2, %3) : (tensor<2x4xf32>, tensor<2x2xf32>, tensor<2x14xf32>) -> ()
// CHECK:      [[BOTH:%.*]] = nn.concat %x, %y dim 1
// CHECK-NEXT: [[INSIDE:%.*]] = nn.slice %y dim 1 from 1 to 5
// CHECK-NEXT: [[ACROSS:%.*]] = nn.slice [[BOTH]] dim 1 from 3 to 5
// CHECK-NEXT: [[FLAT:%.*]] = nn.concat %x, %x, %y dim 1
// CHECK-NEXT: "test.op"([[INSIDE]], [[ACROSS]], [[FLAT]])

// -----

// Elementwise ops broadcast; an expand is only kept for a size that neither operand has.
%x, %row, %one = "test.op"() : () -> (tensor<?x4xf32, #nn.dims<"batch", _>>, tensor<4xf32>, tensor<1xf32>)
%0 = nn.expand %row : tensor<4xf32> -> tensor<?x4xf32, #nn.dims<"batch", _>>
%1 = nn.mul %x, %0 : tensor<?x4xf32, #nn.dims<"batch", _>>, tensor<?x4xf32, #nn.dims<"batch", _>> -> tensor<?x4xf32, #nn.dims<"batch", _>>
%2 = nn.expand %one : tensor<1xf32> -> tensor<3x1xf32>
%3 = nn.add %2, %row : tensor<3x1xf32>, tensor<4xf32> -> tensor<3x4xf32>
"test.op"(%1, %3) : (tensor<?x4xf32, #nn.dims<"batch", _>>, tensor<3x4xf32>) -> ()
// CHECK:      nn.mul %x, %row
// CHECK-NEXT: [[COLUMN:%.*]] = nn.expand %one
// CHECK-NEXT: nn.add [[COLUMN]], %row

// -----

// A fused projection, cut in parts (Phi-3), is one projection per part, by rows of the weight.
%x, %w, %b = "test.op"() : () -> (tensor<2x8xbf16>, tensor<6x8xbf16>, tensor<6xbf16>)
%0 = nn.linear %x, %w bias %b : tensor<2x8xbf16>, tensor<6x8xbf16> bias tensor<6xbf16> -> tensor<2x6xbf16> loc("qkv"("linear"))
%1 = nn.slice %0 dim 1 from 0 to 4 : tensor<2x6xbf16> -> tensor<2x4xbf16> loc("attn"("q"))
%2 = nn.slice %0 dim 1 from 4 to 6 : tensor<2x6xbf16> -> tensor<2x2xbf16> loc("attn"("k"))
"test.op"(%1, %2) : (tensor<2x4xbf16>, tensor<2x2xbf16>) -> ()
// CHECK:      [[WQ:%.*]] = nn.slice %w dim 0 from 0 to 4 {{.*}} loc("qkv"("linear"))
// CHECK-NEXT: [[BQ:%.*]] = nn.slice %b dim 0 from 0 to 4
// CHECK-NEXT: [[Q:%.*]] = nn.linear %x, [[WQ]] bias [[BQ]] {{.*}} -> tensor<2x4xbf16> loc("qkv"("linear"))
// CHECK-NEXT: [[WK:%.*]] = nn.slice %w dim 0 from 4 to 6
// CHECK-NEXT: [[BK:%.*]] = nn.slice %b dim 0 from 4 to 6
// CHECK-NEXT: [[K:%.*]] = nn.linear %x, [[WK]] bias [[BK]]
// CHECK-NEXT: "test.op"([[Q]], [[K]])

// -----

// Not if the projection is also used whole, nor for a slice of rows.
%x, %w = "test.op"() : () -> (tensor<4x8xbf16>, tensor<6x8xbf16>)
%0 = nn.linear %x, %w : tensor<4x8xbf16>, tensor<6x8xbf16> -> tensor<4x6xbf16>
%1 = nn.slice %0 dim 1 from 0 to 4 : tensor<4x6xbf16> -> tensor<4x4xbf16>
%2 = nn.linear %x, %w : tensor<4x8xbf16>, tensor<6x8xbf16> -> tensor<4x6xbf16>
%3 = nn.slice %2 dim 0 from 0 to 1 : tensor<4x6xbf16> -> tensor<1x6xbf16>
"test.op"(%0, %1, %3) : (tensor<4x6xbf16>, tensor<4x4xbf16>, tensor<1x6xbf16>) -> ()
// CHECK:      nn.linear %x, %w
// CHECK-NEXT: nn.slice {{.*}} dim 1 from 0 to 4
// CHECK-NEXT: nn.linear %x, %w
// CHECK-NEXT: nn.slice {{.*}} dim 0 from 0 to 1

// -----

// Views and widening casts of constants are constants.
%0 = nn.constant dense<[1.0, 0.5]> : tensor<2xbf16>
%1 = nn.reshape %0 : tensor<2xbf16> -> tensor<1x2x1xbf16>
%2 = nn.cast %1 : tensor<1x2x1xbf16> -> tensor<1x2x1xf32>
%3 = nn.slice %2 dim 1 from 1 to 2 : tensor<1x2x1xf32> -> tensor<1x1x1xf32>
"test.op"(%2, %3) : (tensor<1x2x1xf32>, tensor<1x1x1xf32>) -> ()
// CHECK:       builtin.module
// CHECK-NEXT:  [[ALL:%.*]] = nn.constant dense<{{.*}}> : tensor<1x2x1xf32>
// CHECK-NEXT:  [[HALF:%.*]] = nn.constant dense<5.000000e-01> : tensor<1x1x1xf32>
// CHECK-NEXT:  "test.op"([[ALL]], [[HALF]])
